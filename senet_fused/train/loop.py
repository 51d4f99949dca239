"""The training loop: steps of micro-batches, an evaluation after each epoch, and checkpoints."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import random
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from textwrap import shorten
from typing import Any, TypeVar

import numpy
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import senet_fused

from . import checkpoint
from .checkpoint import CheckpointError
from .data import NOISE, Source, make_loader, mixed
from .logs import RunLog
from .processes import CollectiveError, Processes, StopSignals, data_parallel, ignore_signals
from .schedule import make_schedule

__all__ = ["DTYPES", "Accuracy", "Diverged", "Limits", "Place", "Trainer", "evaluate", "seed_everything"]

T = TypeVar("T")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Diverged(Exception):
    """A loss or a weight is not finite; the message says where, and what to try."""


@dataclass(frozen=True)
class Limits:
    """What does not change the result: steps between checkpoints (0: only after epochs), steps between fetches of the
    losses, and the step at which to stop (None: at the end)."""

    save_every: int = 0
    log_every: int = 10
    max_steps: int | None = None


@dataclass
class Place:
    """How far a run is: epochs that are over, steps of the following one (``position``) and in all, the best accuracy,
    and of the current epoch the sum of the losses and the time in seconds."""

    epoch: int = 0
    position: int = 0
    step: int = 0
    best: float = -1.0
    loss_sum: float = 0.0
    seconds: float = 0.0


@dataclass(frozen=True)
class Accuracy:
    """Fractions of ``images``. top5 is None for at most five classes."""

    top1: float
    top5: float | None
    images: int

    def __str__(self) -> str:
        return f"{self.top1:.2%}" + ("" if self.top5 is None else f" (top-5 {self.top5:.2%})")


class Trainer:
    """One run, in one of its processes. All processes call the same methods in the same order.

    Args:
        settings: see command.settings_of.
        network: on its device, fused, in its memory layout.
        workers: processes that load images. compiled: by torch.compile.

    Raises:
        CollectiveError: the training images do not fill one step.
    """

    def __init__(
        self,
        settings: argparse.Namespace,
        limits: Limits,
        network: nn.Module,
        source: Source,
        processes: Processes,
        signals: StopSignals,
        folder: Path,
        *,
        workers: int = 0,
        compiled: bool = False,
    ) -> None:
        self.settings, self._limits, self._folder = settings, limits, folder
        self._processes, self._signals = processes, signals
        self.place = Place()
        self.log: RunLog | None = None  # in rank 0
        self._dtype = next(network.parameters()).dtype
        options = {
            "rank": processes.rank,
            "size": processes.size,
            "workers": workers,
            "pin_memory": processes.device.type == "cuda",
            "worker_init_fn": ignore_signals,
        }
        self._train = make_loader(source.train, settings.batch_size, settings.seed, **options)
        self._held_out = make_loader(source.held_out, settings.batch_size, None, **options)
        self.effective_batch = settings.batch_size * settings.accumulate * processes.size
        self.steps_per_epoch = len(self._train) // settings.accumulate  # images that do not fill a step are left out
        if self.steps_per_epoch == 0:
            raise CollectiveError(
                f"{len(source.train)} training images do not fill one step of {self.effective_batch} = --batch-size "
                f"{settings.batch_size} x --accumulate {settings.accumulate} x {processes.size} processes; reduce it"
            )
        self.total_steps = settings.epochs * self.steps_per_epoch
        self.network = network
        self.optimizer = torch.optim.SGD(
            network.parameters(),
            settings.lr,
            settings.momentum,
            weight_decay=settings.weight_decay,
            nesterov=settings.nesterov,
        )
        self._schedule = make_schedule(
            self.optimizer,
            settings.schedule,
            epochs=settings.epochs,
            steps_per_epoch=self.steps_per_epoch,
            warmup=settings.warmup,
            step_epochs=settings.step_epochs,
        )
        # The first step may be one that the scaler skips, which the schedule takes for a forgotten optimizer step.
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
        self._scaler = torch.amp.GradScaler(processes.device.type, enabled=settings.amp == "fp16")
        self.ema = None
        if settings.ema:
            self.ema = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(settings.ema), use_buffers=True)
        if compiled:
            network.compile()  # in place, which keeps the keys of its state dict
        self._parallel = data_parallel(network, processes, sync_batchnorm=settings.sync_batchnorm)
        self._loss = nn.CrossEntropyLoss(label_smoothing=settings.label_smoothing)
        self._losses: list[Tensor] = []  # of the steps since the last fetch
        self._rates: list[float] = []
        self._since = 0.0
        # Not seed + rank: rank 1 would then draw what rank 0 draws with the next seed.
        seed_everything(settings.seed if processes.first else mixed(NOISE, settings.seed, processes.rank))

    # ---------------------------------------------------------------------------------- epochs and steps

    def run(self) -> int | str:
        """Trains to the end, to ``max_steps``, or to a signal: "finished", "stopped", or the signal's number.

        Raises:
            Diverged: the last checkpoint is one from before.
            CollectiveError: a checkpoint or the log cannot be written.
        """
        place = self.place
        while place.epoch < self.settings.epochs:
            end = self._train_epoch() or self._finish_epoch()
            if end:
                self.save()
                return end
            place.epoch, place.position, place.loss_sum, place.seconds = place.epoch + 1, 0, 0.0, 0.0
            self.save()
            if self._limit_reached():
                return "stopped"
        return "finished"

    def _limit_reached(self) -> bool:
        return self._limits.max_steps is not None and self._limits.max_steps <= self.place.step < self.total_steps

    def _train_epoch(self) -> int | str | None:
        """What ends the run within the epoch; None if it continues."""
        place, settings = self.place, self.settings
        self._train.sampler.start(place.epoch, place.position * settings.accumulate * settings.batch_size)
        batches = iter(self._train)
        self.network.train()
        self._since = time.perf_counter()
        while place.position < self.steps_per_epoch:
            if self._limit_reached():
                return "stopped"
            self._rates.append(self.optimizer.param_groups[0]["lr"])
            self._losses.append(self._step(batches))
            place.position, place.step = place.position + 1, place.step + 1
            signal = self._signals.agreed()
            ending = signal or place.position == self.steps_per_epoch
            if ending or len(self._losses) >= self._limits.log_every:
                self._fetch_losses()
            if signal:
                return signal
            if self._limits.save_every and place.step % self._limits.save_every == 0 and not ending:
                self.save()
        return None

    def _step(self, batches: Iterator[tuple[Tensor, Tensor]]) -> Tensor:
        """One optimizer step; returns this process's loss, the mean of its micro-batches, without waiting for it."""
        accumulate = self.settings.accumulate
        total = torch.zeros((), device=self._processes.device)
        for micro_batch in range(accumulate):
            images, targets = next(batches)
            targets = targets.to(self._processes.device, non_blocking=True)
            # Gradients are summed over the processes once a step, after the last micro-batch.
            local = self._processes.size > 1 and micro_batch < accumulate - 1
            with self._parallel.no_sync() if local else contextlib.nullcontext():
                with self._autocast():
                    loss = self._loss(self._parallel(self._move(images)), targets) / accumulate
                self._scaler.scale(loss).backward()
            total += loss.detach()
        if self._processes.size > 1 and self.place.step == 0:
            self._require_gradients()
        self._scaler.step(self.optimizer)
        self._scaler.update()
        self.optimizer.zero_grad()
        self._schedule.step()
        if self.ema is not None:
            self.ema.update_parameters(self.network)
        return total

    def _require_gradients(self) -> None:
        """From the second step on DistributedDataParallel would wait for gradients that never come."""
        names = [name for name, p in self.network.named_parameters() if p.requires_grad and p.grad is None]
        if names:
            raise CollectiveError(
                f"the loss does not depend on these parameters of {self.settings.model}: {', '.join(names)}. For "
                "several processes freeze them (requires_grad_(False)) or remove them"
            )

    def _autocast(self) -> AbstractContextManager:
        dtype = DTYPES.get(self.settings.amp)
        return torch.autocast(self._processes.device.type, dtype, enabled=dtype is not None)

    def _move(self, images: Tensor) -> Tensor:
        layout = torch.channels_last if self.settings.channels_last else torch.preserve_format
        return images.to(self._processes.device, self._dtype, non_blocking=True, memory_format=layout)

    # ---------------------------------------------------------------------------------- what is logged

    def _fetch_losses(self) -> None:
        """Fetches the losses since the last time, which waits for the device, and logs them.

        Raises:
            Diverged: one of them is not finite.
        """
        place, settings = self.place, self.settings
        if not self._losses:
            return
        losses = (self._processes.sum(torch.stack(self._losses)) / self._processes.size).tolist()
        seconds = time.perf_counter() - self._since
        speed = self.effective_batch * len(losses) / seconds
        first = place.step - len(losses) + 1
        rows = [
            dict(step=step, epoch=place.epoch + 1, loss=loss, learning_rate=rate, images_per_second=round(speed, 3))
            for step, loss, rate in zip(itertools.count(first), losses, self._rates, strict=False)
        ]
        finite = list(itertools.takewhile(lambda row: math.isfinite(row["loss"]), rows))
        self._in_rank_0(lambda log: log.write_steps(finite))
        if len(finite) < len(rows):
            bad = rows[len(finite)]
            raise Diverged(f"the loss of step {bad['step']} is {bad['loss']}. {self._advice()}")
        for loss in losses:  # one by one, so that rounding does not depend on --log-every
            place.loss_sum += loss
        place.seconds += seconds
        left = timedelta(seconds=round((self.total_steps - place.step) * seconds / len(losses)))
        text = f"epoch {place.epoch + 1}/{settings.epochs}  loss {losses[-1]:.4f}  {speed:,.0f} images/s  {left} left"
        if self.log is not None:
            self.log.progress(place.step, self.total_steps, text)
        self._losses, self._rates, self._since = [], [], time.perf_counter()

    def _in_rank_0(self, work: Callable[[RunLog], object]) -> None:
        """Raises CollectiveError in all processes if it fails."""
        self._processes.collective(lambda: None if self.log is None else work(self.log))

    def _advice(self) -> str:
        path = self._folder / checkpoint.LAST
        return (
            f"Try a lower --lr than {self.settings.lr:g} or a longer --warmup"
            + (" or --amp bf16" if self.settings.amp == "fp16" else "")
            + (f"; {path} is from before, and --resume continues from it" if path.exists() else "")
        )

    def _finish_epoch(self) -> int | None:
        """Evaluates and logs the epoch; a signal's number if one came meanwhile."""
        place = self.place
        begin = time.perf_counter()
        found = []
        for network in [self.network] if self.ema is None else [self.network, self.ema.module]:
            self._processes.broadcast_buffers(network)
            accuracy = evaluate(network, self._held_out, self._processes, self._move, self._autocast, self._signals)
            if accuracy is None:
                return max(self._processes.gather(self._signals.received))
            found.append(accuracy)
        place.seconds += time.perf_counter() - begin
        place.best = max(place.best, *(accuracy.top1 for accuracy in found))
        row = {
            "epoch": place.epoch + 1,
            "step": place.step,
            "train_loss": place.loss_sum / self.steps_per_epoch,
            "seconds": round(place.seconds, 3),
        }
        for prefix, accuracy in zip(("", "ema_"), found, strict=False):
            row |= {f"{prefix}accuracy": accuracy.top1, f"{prefix}top5": accuracy.top5}
        self._in_rank_0(lambda log: log.write_epoch(row))
        if self.log is not None:
            self.log.say(
                f"epoch {row['epoch']}/{self.settings.epochs}: train loss {row['train_loss']:.4f}, accuracy on "
                f"{found[0].images} held-out images {', of the average '.join(map(str, found))}, "
                f"{timedelta(seconds=round(place.seconds))}"
            )
        return None

    # ---------------------------------------------------------------------------------- checkpoints

    def save(self) -> None:
        """Writes a checkpoint.

        Raises:
            Diverged: a weight is not finite.
            CollectiveError: it, or the log, cannot be written.
        """
        self._fetch_losses()
        with torch.no_grad():
            finite = bool(torch.stack([p.isfinite().all() for p in self.network.parameters()]).all())
        if not finite:
            raise Diverged(f"after step {self.place.step} the weights are not finite. {self._advice()}")
        processes = self._processes.gather({"rng": checkpoint.rng_state()})

        def write() -> None:
            if self._processes.first:
                versions = {"senet_fused": str(senet_fused.__version__), "torch": str(torch.__version__)}
                state = {
                    "settings": vars(self.settings),
                    **asdict(self.place),
                    "processes": processes,
                    "versions": versions,
                    **{name: part.state_dict() for name, part in self._parts().items()},
                }
                checkpoint.save(self._folder, state)

        self._processes.collective(write)
        self._since = time.perf_counter()

    def _parts(self) -> dict[str, Any]:
        parts = {
            "model": self.network,
            "optimizer": self.optimizer,
            "schedule": self._schedule,
            "scaler": self._scaler,
            "ema": self.ema,
        }
        return {name: part for name, part in parts.items() if part is not None}

    def restore(self, state: dict[str, Any]) -> None:
        """Continues from a checkpoint with the same settings.

        Raises:
            CheckpointError: it is of another network.
        """
        try:
            for name, part in self._parts().items():
                part.load_state_dict(state[name])
        except RuntimeError as error:
            raise CheckpointError(
                f"the checkpoint is of another network named {self.settings.model}: {shorten(str(error), 400)} "
                "Use the code and data that it was made with, or begin a new run in another --output"
            ) from None
        self.place = Place(**{name: state[name] for name in asdict(self.place)})
        checkpoint.set_rng_state(state["processes"][self._processes.rank]["rng"])


@torch.no_grad()
def evaluate(
    network: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    processes: Processes,
    move: Callable[[Tensor], Tensor],
    autocast: Callable[[], AbstractContextManager],
    signals: StopSignals,
) -> Accuracy | None:
    """The network's accuracy in evaluation mode over all processes; None in all if a signal stops one of them.

    Not every process needs to have as many batches: there is one collective operation, at the end.

    Args:
        batches: images [N, ...] and their classes [N], those of this process.
        move: brings images to the device, in their layout.
    """
    counts = torch.zeros(4, dtype=torch.int64, device=processes.device)  # top-1, top-5, images, processes that stopped
    top5 = True
    training = network.training
    network.eval()
    try:
        for images, targets in batches:
            if signals.received:
                counts[3] += 1
                break
            targets = targets.to(processes.device)
            with autocast():
                scores = network(move(images))
            top5 = scores.shape[1] > 5
            hits = scores.topk(5 if top5 else 1, 1).indices == targets[:, None]
            counts[0] += hits[:, 0].sum()
            counts[1] += hits.any(1).sum()
            counts[2] += len(hits)
    finally:
        network.train(training)
    right, right5, seen, stopped = processes.sum(counts).tolist()
    return None if stopped else Accuracy(right / seen, right5 / seen if top5 else None, seen)


def seed_everything(seed: int) -> None:
    """Python's, NumPy's and PyTorch's generators, those of all devices."""
    random.seed(seed)
    numpy.random.seed(seed % 2**32)  # NumPy's range of seeds
    torch.manual_seed(seed)
