"""Training networks side by side, step by step.

A step of one network is followed by the same step of the others, and every round another one goes first, so that other
load on the machine affects all of them alike.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import OneCycleLR

__all__ = ["Contender", "accuracy", "nudge", "train"]

PEAK_LEARNING_RATE = 0.3


@dataclass
class Contender:
    """A network, the images it is trained on [N, 1, H, W], and the loss and the seconds of each step."""

    name: str
    network: nn.Module
    images: Tensor
    losses: list[float] = field(default_factory=list)
    step_s: list[float] = field(default_factory=list)


def nudge(images: Tensor, seed: int) -> Tensor:
    """Every pixel moved to the next representable number, up or down at random."""
    generator = torch.Generator().manual_seed(seed)
    up = torch.randint(0, 2, images.shape, generator=generator).bool()
    return torch.nextafter(images, torch.where(up, math.inf, -math.inf))


def train(contenders: list[Contender], targets: Tensor, epochs: int, batch_size: int, seed: int) -> Iterator[int]:
    """Trains all contenders on the same batches; yields the number of steps done whenever all did one more.

    SGD with Nesterov momentum on cross-entropy, with one cycle of the learning rate; an epoch drops the images that
    fill no batch. Raises FloatingPointError if a loss is not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    batches = len(targets) // batch_size
    runs = []
    for contender in contenders:
        optimizer = torch.optim.SGD(contender.network.parameters(), momentum=0.9, weight_decay=5e-4, nesterov=True)
        # The quarter in which the rate rises has to be of more than one step.
        total = max(8, epochs * batches)
        schedule = OneCycleLR(optimizer, PEAK_LEARNING_RATE, total, pct_start=0.25, cycle_momentum=False)
        runs.append((contender, optimizer, schedule))
    done = 0
    for _ in range(epochs):
        order = torch.randperm(len(targets), generator=generator)
        for batch in order[: batches * batch_size].split(batch_size):
            first = done % len(runs)
            done += 1
            for contender, optimizer, schedule in runs[first:] + runs[:first]:
                images, wanted = contender.images[batch], targets[batch]
                contender.network.train()
                start = time.perf_counter()
                loss = F.cross_entropy(contender.network(images), wanted)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                contender.step_s.append(time.perf_counter() - start)
                if done < epochs * batches:
                    schedule.step()
                contender.losses.append(loss.item())
                if not math.isfinite(contender.losses[-1]):
                    raise FloatingPointError(f"{contender.name}: the loss of step {done} is {contender.losses[-1]}")
            yield done


@torch.no_grad()
def accuracy(network: nn.Module, images: Tensor, targets: Tensor) -> float:
    """The share of images [N, 1, H, W] whose largest logit is the target."""
    network.eval()
    guesses = torch.cat([network(some).argmax(1) for some in images.split(128)])
    return float((guesses == targets).double().mean())
