"""Device time by CUDA-graph replay. Host work (Python, launches) is not in it; wall time is taken beside it.

Each contender is captured as one graph of as many calls as there are buffers. Cold: a scratch block of twice
the L2 is overwritten before a replay, outside the timed span, and no call reads a buffer that another call of
the replay has read. Warm: all calls of the graph read the same buffer.

Everything that is timed, its preparation and the wall time too, runs in one stream of its own: nothing can be captured
in the default one, and autograd runs a backward in the stream of its forward.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache

import torch

from .timing import Outcome, Settings, Statistics, describe

__all__ = ["l2_bytes", "own_stream", "replay"]

_WARM_UP_CALLS = 3  # outside the capture: lazy initialisation, autotuning and cuBLAS workspaces are not capturable


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


def _capture(call: Callable[[int], object], numbers: list[int]) -> torch.cuda.CUDAGraph:
    for number in numbers[:_WARM_UP_CALLS]:
        call(number)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        for number in numbers:
            call(number)
    graph.replay()
    torch.cuda.synchronize()
    return graph


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
    graphs: dict[str, torch.cuda.CUDAGraph] = {}
    errors: dict[str, str] = {}
    for name, call in calls.items():
        try:
            graphs[name] = _capture(call, numbers)
        except Exception as error:
            errors[name] = describe(error)
            torch.cuda.synchronize()

    scratch = torch.empty(2 * l2_bytes(device), dtype=torch.uint8, device=device) if cold else None
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    samples: dict[str, list[float]] = {name: [] for name in graphs}
    order = random.Random(0)
    deadline = time.perf_counter() + settings.budget_s
    rounds = 0
    while samples and rounds < settings.max_rounds:
        if rounds >= settings.min_rounds and time.perf_counter() >= deadline:
            break
        for name in order.sample(sorted(samples), len(samples)):
            try:
                if scratch is not None:
                    scratch.fill_(rounds % 251 + 1)
                start.record()
                graphs[name].replay()
                end.record()
                end.synchronize()
                samples[name].append(start.elapsed_time(end) * 1e-3 / len(numbers))
            except Exception as error:
                errors[name] = describe(error)
                del samples[name]
        rounds += 1
        tick()
    return {
        name: Outcome(None, errors[name]) if name in errors else Outcome(Statistics.of(samples[name], len(numbers)))
        for name in calls
    }
