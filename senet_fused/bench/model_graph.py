"""A call as one CUDA graph: what is launched is recorded once, and a replay costs the host next to nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

__all__ = ["Captured", "capture"]

# Outside the capture: lazy initialisation, the optimizer's state and cuDNN's choice of algorithms.
_WARM_UP_CALLS = 3


class Captured(NamedTuple):
    """replay runs the call again, on the same tensors; result is what the captured call gave, which a replay writes
    anew. peak_bytes: the most that the tensors of the call took at once, beyond what there was before it."""

    replay: Callable[[], None]
    result: Any
    peak_bytes: int


def capture(call: Callable[[], Any]) -> Captured:
    """Captures a call, which has run a few times before. It may not wait for the device or read from it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UP_CALLS):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.cuda.graph(graph, stream=stream):
        result = call()
    peak_bytes = torch.cuda.max_memory_allocated() - before
    torch.cuda.synchronize()
    return Captured(graph.replay, result, peak_bytes)
