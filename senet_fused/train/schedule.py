"""The learning rate of every step: SENet's own schedule, or half a cosine, each after a linear warm-up."""

from __future__ import annotations

from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR, StepLR

__all__ = ["make_schedule", "paper_rate", "paper_step_epochs"]


# Hu et al., "Squeeze-and-Excitation Networks" (2018), section 6: SGD with momentum 0.9, minibatches of 1024, an
# initial learning rate of 0.6 that falls to a tenth every 30 epochs, 100 epochs.
def paper_rate(batch: int) -> float:
    """The learning rate of SENet's authors, in proportion to the images of an optimizer step."""
    return 0.6 * batch / 1024


def paper_step_epochs(epochs: int) -> int:
    """After how many epochs the rate falls, in proportion to the length of the training, at least one."""
    return max(1, round(epochs * 30 / 100))


def make_schedule(
    optimizer: Optimizer, kind: str, *, epochs: int, steps_per_epoch: int, warmup: float, step_epochs: int
) -> LRScheduler:
    """A schedule to be stepped after every optimizer step. The optimizer's learning rate is its peak.

    Args:
        kind: "paper": to a tenth every ``step_epochs`` epochs after the warm-up. "cosine": towards zero, which it
            would reach one step after the last.
        warmup: in epochs. Step i of its w steps (from 0) has the rate (i + 1) / (w + 1) of the peak.
    """
    total = epochs * steps_per_epoch
    warm = min(round(warmup * steps_per_epoch), total - 1)
    if kind == "paper":
        main: LRScheduler = StepLR(optimizer, step_epochs * steps_per_epoch, gamma=0.1)
    else:
        main = CosineAnnealingLR(optimizer, total - warm)
    if warm == 0:
        return main
    return SequentialLR(optimizer, [LinearLR(optimizer, 1 / (warm + 1), 1.0, warm), main], [warm])
