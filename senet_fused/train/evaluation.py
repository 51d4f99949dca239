"""How many held-out images a network gets right, over all processes, each image counted once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .items import NO_CLASS
from .processes import Processes

__all__ = ["Accuracy", "evaluate"]

_TOP = 5


@dataclass(frozen=True)
class Accuracy:
    """Shares from 0 to 1 of ``images``. top5 is None where there are no more than five classes."""

    top1: float
    top5: float | None
    images: int

    def __str__(self) -> str:
        return f"{self.top1:.2%}" + ("" if self.top5 is None else f" (top-5 {self.top5:.2%})")


@torch.no_grad()
def evaluate(
    network: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    processes: Processes,
    *,
    move: Callable[[Tensor], Tensor],
    autocast: Callable[[], AbstractContextManager],
    stopped: Callable[[], bool],
) -> Accuracy | None:
    """The network's accuracy in evaluation mode; its mode is afterwards as before.

    Args:
        batches: images [N, ...] and their classes [N], those of this process; one of class NO_CLASS does not count.
        move: brings images to the device, in their layout.
        stopped: asked before each batch. Where it says yes in one process, the result is None in all.
    """
    right, right5, seen, broken_off = 0, 0, 0, 0
    wide = False
    training = network.training
    network.eval()
    try:
        for images, targets in batches:
            if stopped():
                broken_off = 1
                break
            targets = targets.to(processes.device)
            with autocast():
                scores = network(move(images))
            right += (scores.argmax(1) == targets).sum()
            if wide := scores.shape[1] > _TOP:
                right5 += (scores.topk(_TOP, 1).indices == targets[:, None]).any(1).sum()
            seen += (targets != NO_CLASS).sum()
    finally:
        network.train(training)
    counts = torch.tensor([int(right), int(right5), int(seen), broken_off, int(wide)], device=processes.device)
    right, right5, seen, broken_off, wide = processes.sum(counts).tolist()
    if broken_off:
        return None
    return Accuracy(right / max(1, seen), right5 / max(1, seen) if wide else None, seen)
