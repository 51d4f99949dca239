"""The memory of a training step: what autograd saves during the forward, and the most that the step holds at once."""

from __future__ import annotations

import gc
import itertools
import os
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

__all__ = ["Saved", "peak_bytes"]


class Saved:
    """Around a forward: the bytes of the storages that autograd saves in it, each once. Afterwards in ``bytes``.

    besides: tensors whose storages do not count, as they are there in any case: the network's own, and its input.
    """

    def __init__(self, besides: Iterable[Tensor]) -> None:
        self._besides = {tensor.untyped_storage().data_ptr() for tensor in besides}
        self._storages: dict[int, torch.UntypedStorage] = {}  # alive, so that no address is given out again
        self.bytes: int | None = None

    @torch.compiler.disable  # within a compiled network it would be compiled for every address
    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._besides:
            self._storages[storage.data_ptr()] = storage
        return tensor.detach()  # an output of the node that saves it would keep itself alive

    def __enter__(self) -> None:
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)
        self._hooks.__enter__()

    def __exit__(self, *raised: Any) -> None:
        self._hooks.__exit__(*raised)
        self.bytes = sum(storage.nbytes() for storage in self._storages.values())
        self._storages.clear()  # the backward frees as it goes


def peak_bytes(step: Callable[[], object], device: str) -> int:
    """The most that the tensors which a step allocates take at once, beyond what there was before it.

    On a GPU PyTorch's allocator knows; on a CPU it is the running sum of the allocations and releases that the profiler
    records. Neither sees what libraries allocate for themselves.
    """
    if device == "cuda":
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it reports its start and its end on stderr
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        step()
    events = [event for event in profile.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events), default=0)
