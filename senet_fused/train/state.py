"""What a checkpoint holds of a run, and putting a run back to where it was.

description, settings        which network it is, and how it is trained; both have to agree on resuming
model, optimizer, schedule, scaler, ema
processes                    by rank: its random generators, and its place among the training images
epoch, position, step        epochs that are over; steps done of the one after them; steps in all
best, loss_sum, seconds      the best accuracy so far; of this epoch, the sum of its losses, and what it took
log_offsets                  how long the logs were
versions                     of the packages that wrote it
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import senet_fused

from .checkpoint import CheckpointError
from .schedule import make_schedule
from .settings import Settings

__all__ = ["Learner", "Place", "check_weights", "seed_everything"]

_NAMED = 3  # of weights that differ


@dataclass
class Place:
    """How far a run is. ``position`` counts steps of the epoch after the ``epoch`` that are over."""

    epoch: int = 0
    position: int = 0
    step: int = 0
    best: float = -1.0
    loss_sum: float = 0.0
    seconds: float = 0.0

    def next_epoch(self) -> None:
        """The one at hand is over."""
        self.epoch, self.position, self.loss_sum, self.seconds = self.epoch + 1, 0, 0.0, 0.0


@dataclass
class Learner:
    """Everything that a step changes, but random generators and the place among the images."""

    network: nn.Module
    optimizer: Optimizer
    schedule: LRScheduler
    scaler: torch.amp.GradScaler
    ema: AveragedModel | None

    @classmethod
    def of(cls, network: nn.Module, settings: Settings, device: torch.device, steps_per_epoch: int) -> Learner:
        """At the beginning of a run."""
        optimizer = torch.optim.SGD(
            network.parameters(), settings.lr, settings.momentum,
            weight_decay=settings.weight_decay, nesterov=settings.nesterov,
        )  # fmt: skip
        schedule = make_schedule(
            optimizer, settings.schedule, epochs=settings.epochs, steps_per_epoch=steps_per_epoch,
            warmup=settings.warmup, step_epochs=settings.step_epochs,
        )  # fmt: skip
        # A first step that the scaler skips is no step of the optimizer, of which the schedule would warn.
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
        scaler = torch.amp.GradScaler(device.type, enabled=settings.amp == "fp16")
        averaging = get_ema_multi_avg_fn(settings.ema)
        ema = AveragedModel(network, multi_avg_fn=averaging, use_buffers=True) if settings.ema else None
        return cls(network, optimizer, schedule, scaler, ema)

    def state(self) -> dict[str, Any]:
        """For a checkpoint; load_state takes it back."""
        return {
            "model": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "versions": {"senet_fused": str(senet_fused.__version__), "torch": str(torch.__version__)},
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Tensors go to the device of what they belong to."""
        self.network.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])

    def is_finite(self) -> bool:
        """Whether every weight is a finite number."""
        with torch.no_grad():
            return bool(torch.stack([p.isfinite().all() for p in self.network.parameters()]).all())


def check_weights(saved: Mapping[str, Tensor], network: nn.Module) -> None:
    """Raises CheckpointError unless these are weights and buffers of such a network; names the first that differ."""
    here = network.state_dict()
    different = []
    for name in dict.fromkeys([*saved, *here]):
        before, now = ("absent" if name not in state else str(list(state[name].shape)) for state in (saved, here))
        if before != now:
            different.append(f"{name} is {before} in the checkpoint and {now} here")
    if different:
        more = f"; and {len(different) - _NAMED} more" if len(different) > _NAMED else ""
        raise CheckpointError(
            f"the checkpoint is of another network of this name: {'; '.join(different[:_NAMED])}{more}. Use the code "
            "that it was made with, or begin a new run in another --output"
        )


def seed_everything(seed: int) -> None:
    """Python's, NumPy's and PyTorch's generators, those of all devices."""
    random.seed(seed)
    numpy.random.seed(seed % 2**32)  # whose seeds end there
    torch.manual_seed(seed)
