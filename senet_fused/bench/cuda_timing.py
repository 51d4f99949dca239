"""Device time by CUDA-graph replay. Host work (Python, launches) is not in it; wall time is taken beside it.

Each contender is captured as one graph of as many calls as there are buffers. Cold: a scratch block of twice
the L2 is overwritten before a replay, outside the timed span, and no call reads a buffer that another call of
the replay has read. Warm: all calls of the graph read the same buffer.

Everything that is timed, its preparation and the wall time too, runs in one stream of its own: nothing can be captured
in the default one, and autograd runs a backward in the stream of its forward.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch

from .timing import Outcome, Settings, describe, sample_in_turns

__all__ = ["Captured", "capture", "l2_bytes", "own_stream", "replay"]

_WARM_UP_CALLS = 3


def l2_bytes(device: torch.device) -> int:
    """The size of the device's L2 cache."""
    return torch.cuda.get_device_properties(device).L2_cache_size


@lru_cache(maxsize=1)
def _stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()


@contextlib.contextmanager
def own_stream() -> Iterator[None]:
    """Within the block the current stream is the one that is timed; around it, it waits and is waited for."""
    stream, outer = _stream(), torch.cuda.current_stream()
    stream.wait_stream(outer)
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        outer.wait_stream(stream)
        torch.cuda.synchronize()


class Captured(NamedTuple):
    """replay runs the captured work again, on the same tensors.

    result: of the captured call, written anew by a replay. peak_bytes: the most that tensors of the work took at once,
    beyond what was allocated before.
    """

    replay: Callable[[], None]
    result: Any
    peak_bytes: int


def capture(work: Callable[[], Any], warm_up: Callable[[], object] | None = None) -> Captured:
    """What is launched by a call as one CUDA graph. It may not wait for the device or read from it.

    Args:
        work: what is captured.
        warm_up: runs before, in the stream of the capture; work itself, three times, if it is None. Lazy
            initialisation, autotuning, workspaces and an optimizer's state cannot be captured.
    """
    with own_stream():
        for call in [warm_up] if warm_up is not None else [work] * _WARM_UP_CALLS:
            call()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.cuda.graph(graph, stream=_stream()):
        result = work()
    peak_bytes = torch.cuda.max_memory_allocated() - before
    torch.cuda.synchronize()
    return Captured(graph.replay, result, peak_bytes)


def replay(
    calls: Mapping[str, Callable[[int], object]],
    numbers: list[int],
    settings: Settings,
    *,
    device: torch.device,
    cold: bool,
    tick: Callable[[], None] = lambda: None,
) -> dict[str, Outcome]:
    """Times the contenders' graphs, round by round in a shuffled order. Called within :func:`own_stream`.

    Args:
        calls: call(buffer number) by name; it may not synchronise or read on the host.
        numbers: the buffer of every call in the graph: all different for cold, all the same for warm.
        cold: overwrite the L2 before every replay.

    A contender that cannot be captured or raises gets its error; the others go on.
    """
    samples: dict[str, Callable[[], float]] = {}
    errors: dict[str, str] = {}
    scratch = torch.empty(2 * l2_bytes(device), dtype=torch.uint8, device=device) if cold else None
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for name, call in calls.items():

        def run(numbers: list[int], call: Callable[[int], object] = call) -> None:
            for number in numbers:
                call(number)

        try:
            graph = capture(partial(run, numbers), partial(run, numbers[:_WARM_UP_CALLS]))
            graph.replay()
            torch.cuda.synchronize()
        except Exception as error:
            errors[name] = describe(error)
            torch.cuda.synchronize()
            continue

        def sample(graph: Captured = graph) -> float:
            if scratch is not None:
                scratch.fill_(1)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) * 1e-3 / len(numbers)

        samples[name] = sample
    return sample_in_turns(samples, dict.fromkeys(samples, len(numbers)), errors, settings, tick)
