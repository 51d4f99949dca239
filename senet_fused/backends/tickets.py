"""Counters in GPU memory: the block that counts last in a group of samples sums the group's shares."""

from __future__ import annotations

import threading
from functools import lru_cache

import torch
from torch import Tensor

__all__ = ["Tickets", "tickets_for"]


class Tickets:
    """Counters for the "last_block" strategy on one device: zero before and after each kernel that uses them.

    Calls in one stream are ordered, so each stream reuses counters of its own. A graph may be replayed in any stream:
    each call in it gets counters that no other call gets. When they run out, and in a graph that is captured before
    any other call, a call gets fresh ones, which take one more kernel to clear.
    """

    SIZE = 1 << 20

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.counters: Tensor | None = None
        self.taken = 0
        self.of_stream: dict[int, Tensor] = {}
        self.lock = threading.Lock()

    def get(self, count: int, stream: int, capturing: bool) -> Tensor:
        """`count` counters for a call in this stream."""
        found = self.of_stream.get(stream)
        if capturing or found is None or found.numel() < count:
            with self.lock:
                if self.counters is None and not capturing:
                    self._allocate()
                found = self._take(count if capturing else max(1024, count))
                if found is not None and not capturing:
                    self.of_stream[stream] = found
        return torch.zeros(count, dtype=torch.int32, device=self.device) if found is None else found

    def _take(self, count: int) -> Tensor | None:
        if self.counters is None or self.taken + count > self.SIZE:
            return None
        self.taken += count
        return self.counters[self.taken - count : self.taken]

    def _allocate(self) -> None:
        """In a thread of its own, because the caller's may be allocating from a pool that does not outlive the call, as
        torch.compile's does while it warms up a graph; in a stream of its own, so that waiting for the zeros, which all
        streams rely on from then on, waits for nothing else."""

        def allocate() -> None:
            with torch.cuda.device(self.device), torch.cuda.stream(torch.cuda.Stream()):
                self.counters = torch.zeros(self.SIZE, dtype=torch.int32, device=self.device)
                torch.cuda.current_stream().synchronize()

        thread = threading.Thread(target=allocate)
        thread.start()
        thread.join()


@lru_cache(maxsize=64)
def _tickets_of(device: torch.device) -> Tickets:
    return Tickets(device)


def tickets_for(x: Tensor, count: int) -> Tensor:
    """`count` counters at zero for a call on x, in the current stream of x's device."""
    if x.device.type == "cpu":
        return torch.zeros(count, dtype=torch.int32)
    stream = torch.cuda.current_stream(x.device).cuda_stream
    if x.device.index == torch.cuda.current_device():
        capturing = torch.cuda.is_current_stream_capturing()
    else:
        with torch.cuda.device(x.device):
            capturing = torch.cuda.is_current_stream_capturing()
    return _tickets_of(x.device).get(count, stream, capturing)
