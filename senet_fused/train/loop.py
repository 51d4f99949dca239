"""The training loop: steps of micro-batches, an evaluation after each epoch, checkpoints, and where it ends."""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..arguments import RequestError
from . import checkpoint, data
from .evaluation import Accuracy, evaluate
from .items import NOISE, mixed
from .logs import RunLog, writing
from .processes import AgreedError, Processes, StopSignals, distribute, leave_signals_to_the_run
from .settings import Settings
from .state import Learner, Place, seed_everything

__all__ = ["Diverged", "Limits", "Trainer"]

T = TypeVar("T")
_NAMED = 5  # of parameters without a gradient
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Diverged(Exception):
    """A loss, or a weight, is no finite number any more; the message says where, and what to try."""


@dataclass(frozen=True)
class Limits:
    """When the loop does what does not change the result: steps between checkpoints (0: only after epochs) and between
    looks at the losses, and the step at which it stops (None: at the end)."""

    save_every: int = 0
    log_every: int = 10
    max_steps: int | None = None


class Trainer:
    """One run, in one of its processes. All processes call the same methods in the same order.

    Args:
        network: on its device, with whatever else it is to be (fused, synchronised, in a memory layout).
        description: what a checkpoint says of it.
        workers: processes that load images. compiled: by torch.compile.
    """

    def __init__(
        self, settings: Settings, limits: Limits, network: nn.Module, description: dict[str, Any],
        source: data.Source, processes: Processes, signals: StopSignals, folder: Path, *, workers: int = 0,
        compiled: bool = False,
    ) -> None:  # fmt: skip
        self._settings, self._limits, self._description = settings, limits, description
        self._processes, self._signals, self._folder = processes, signals, folder
        self.place = Place()
        self.log: RunLog | None = None  # in the first process
        self._loss = nn.CrossEntropyLoss(label_smoothing=settings.label_smoothing)
        self._dtype = next(network.parameters()).dtype
        self._open_loaders(source, workers)
        self.learner = Learner.of(network, settings, processes.device, self.steps_per_epoch)
        if compiled:
            network.compile()  # in place, so that the keys of its state stay what they are
        self.parallel = distribute(network, processes, sync_batchnorm=settings.sync_batchnorm)
        self._losses: list[Tensor] = []
        self._rates: list[float] = []
        self._since = 0.0
        self._restored: dict[str, Any] | None = None
        # seed + rank would not do: process 1 would then draw what process 0 draws with the next seed.
        seed_everything(settings.seed if processes.first else mixed(NOISE, settings.seed, processes.rank))
        self._all_trained = processes.size == 1

    # ------------------------------------------------------------------------------ what it is made of

    def _open_loaders(self, source: data.Source, workers: int) -> None:
        settings, processes = self._settings, self._processes
        how = {
            "batch_size": settings.batch_size, "seed": settings.seed, "workers": workers, "rank": processes.rank,
            "world_size": processes.size, "pin_memory": processes.device.type == "cuda",
        }  # fmt: skip
        # Of the held-out images each is in one process.
        self._train, self._held_out = processes.together(
            lambda: (
                data.make_loader(source.train, shuffle=True, drop_last=True, **how),
                data.make_loader(source.held_out, shuffle=False, **how),
            )
        )
        for loader in (self._train, self._held_out):
            loader.worker_init_fn = leave_signals_to_the_run
        # What does not fill a step at the end of an epoch is left out of it.
        self.steps_per_epoch = min(processes.of_all(len(self._train))) // settings.accumulate
        if self.steps_per_epoch == 0:
            raise AgreedError(
                f"{len(source.train)} training images do not fill one step of {settings.effective_batch}: --batch-size "
                f"{settings.batch_size} x --accumulate {settings.accumulate} x {processes.size} processes; ask for less"
            )
        self.total_steps = settings.epochs * self.steps_per_epoch

    # ------------------------------------------------------------------------------ going through it

    def run(self) -> int | str:
        """Trains to the end, to ``max_steps``, or to a signal: "finished", "stopped", or the signal's number.

        Raises:
            Diverged: the last checkpoint is one from before.
        """
        while self.place.epoch < self._settings.epochs:
            end = self._train_epoch() or self._finish_epoch()
            if end:
                self.save()
                return end
            self.place.next_epoch()
            self.save()
            if self._is_over():
                return "stopped"
        return "finished"

    def _is_over(self) -> bool:
        return self._limits.max_steps is not None and self._limits.max_steps <= self.place.step < self.total_steps

    def _train_epoch(self) -> int | str | None:
        """What ends the run within the epoch; None if it goes on."""
        place = self.place
        if place.position == self.steps_per_epoch:
            return None
        batches = self._batches()
        self.learner.network.train()
        self._since = time.perf_counter()
        while place.position < self.steps_per_epoch:
            if self._is_over():
                return "stopped"
            self._rates.append(self.learner.optimizer.param_groups[0]["lr"])
            self._losses.append(self._step(batches))
            place.position, place.step = place.position + 1, place.step + 1
            end = self._signals.agreed()
            ending = end or place.position == self.steps_per_epoch
            if ending or len(self._losses) >= self._limits.log_every:
                self._look_at_losses()
            if end:
                return end
            if self._limits.save_every and place.step % self._limits.save_every == 0 and not ending:
                self.save()
        return None

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        restored, self._restored = self._restored, None
        if restored is None or not self.place.position:
            data.set_epoch(self._train, self.place.epoch)
            return iter(self._train)
        data.restore_loader(self._train, restored["loader"], self.place.epoch)
        return iter(self._train)

    def _step(self, batches: Iterator[tuple[Tensor, Tensor]]) -> Tensor:
        """One optimizer step; returns this process's loss, the mean over its micro-batches, without waiting for it."""
        learner, accumulate = self.learner, self._settings.accumulate
        total = torch.zeros((), device=self._processes.device)
        for micro_batch in range(accumulate):
            images, targets = next(batches)
            targets = targets.to(self._processes.device, non_blocking=True)
            with self._synchronised(micro_batch == accumulate - 1):
                with self._autocast():
                    loss = self._loss(self.parallel(self._move(images)), targets) / accumulate
                learner.scaler.scale(loss).backward()
            total += loss.detach()
        if not self._all_trained:
            self._processes.together(self._check_gradients)
            self._all_trained = True
        learner.scaler.step(learner.optimizer)
        learner.scaler.update()
        learner.optimizer.zero_grad()
        learner.schedule.step()
        if learner.ema is not None:
            learner.ema.update_parameters(learner.network)
        return total

    def _check_gradients(self) -> None:
        """After the first backward pass: DistributedDataParallel would wait for every gradient from the second on."""
        names = [name for name, p in self.learner.network.named_parameters() if p.requires_grad and p.grad is None]
        if names:
            raise RequestError(
                f"{self._settings.model} has parameters that the loss does not depend on: {', '.join(names[:_NAMED])}"
                f"{', ...' if len(names) > _NAMED else ''}. Several processes cannot train it: freeze them "
                "(requires_grad_(False)), take them out, or use one process"
            )

    def _synchronised(self, yes: bool) -> AbstractContextManager:
        """Gradients are summed over the processes once a step, after its last micro-batch."""
        if yes or self._processes.size == 1:
            return contextlib.nullcontext()
        return self.parallel.no_sync()

    def _autocast(self) -> AbstractContextManager:
        dtype = _DTYPES.get(self._settings.amp)
        return torch.autocast(self._processes.device.type, dtype, enabled=dtype is not None)

    def _move(self, images: Tensor) -> Tensor:
        layout = torch.channels_last if self._settings.channels_last and images.dim() == 4 else torch.preserve_format
        return images.to(self._processes.device, self._dtype, non_blocking=True, memory_format=layout)

    def _look_at_losses(self) -> None:
        """Fetches the losses of the steps since the last time, which waits for the device, and logs them.

        Raises:
            Diverged: one of them is not finite.
        """
        place, settings = self.place, self._settings
        if not self._losses:
            return
        losses = (self._processes.sum(torch.stack(self._losses)) / self._processes.size).tolist()
        seconds = time.perf_counter() - self._since
        speed = settings.effective_batch * len(losses) / seconds
        first = place.step - len(losses) + 1
        rows = [
            {"step": step, "epoch": place.epoch + 1, "loss": loss, "learning_rate": rate,
             "images_per_second": round(speed, 3)}
            for step, (loss, rate) in enumerate(zip(losses, self._rates, strict=True), first)
        ]  # fmt: skip
        finite = list(itertools.takewhile(lambda row: math.isfinite(row["loss"]), rows))
        self._write(lambda log: log.write_steps(finite))
        if len(finite) < len(rows):
            bad = rows[len(finite)]
            raise Diverged(f"the loss of step {bad['step']} is {bad['loss']}. {self._advice()}")
        for loss in losses:  # one by one, so that the sum's rounding does not depend on --log-every
            place.loss_sum += loss
        place.seconds += seconds
        if self.log is not None:
            left = (self.total_steps - place.step) * seconds / len(losses)
            self.log.terminal.progress(
                place.step, self.total_steps,
                f"epoch {place.epoch + 1}/{settings.epochs}  loss {losses[-1]:.4f}  {speed:,.0f} images/s  "
                f"{_duration(left)} left",
            )  # fmt: skip
        self._losses, self._rates, self._since = [], [], time.perf_counter()

    def _write(self, work: Callable[[RunLog], T]) -> T | None:
        """What ``work`` returns in the first process, which has the log; where it cannot write, all are told."""

        def here() -> T | None:
            if self.log is None:
                return None
            with writing(self._folder):
                return work(self.log)

        return self._processes.together(here)

    def _advice(self) -> str:
        lower = f"a lower --lr than {self._settings.lr:g}, or a longer --warmup"
        narrow = ", or --amp bf16" if self._settings.amp == "fp16" else ""
        kept = self._folder / checkpoint.LAST
        last = f"; {kept} is from before, and a run with it is continued by --resume" if kept.exists() else ""
        return f"Try {lower}{narrow}{last}"

    # ------------------------------------------------------------------------------ between epochs

    def _finish_epoch(self) -> int | None:
        """Evaluates and logs the epoch; a signal's number if one came meanwhile."""
        place, learner = self.place, self.learner
        begin = time.perf_counter()
        accuracy, averaged = self._accuracy(learner.network), None
        if accuracy is not None and learner.ema is not None:
            averaged = self._accuracy(learner.ema.module)
        if accuracy is None or (learner.ema is not None and averaged is None):
            return max(self._processes.of_all(self._signals.received))
        place.seconds += time.perf_counter() - begin
        place.best = max(place.best, accuracy.top1, averaged.top1 if averaged else -1.0)
        self._write(lambda log: self._log_epoch(log, accuracy, averaged))
        return None

    def _accuracy(self, network: nn.Module) -> Accuracy | None:
        self._processes.share_buffers(network)
        return evaluate(
            network, self._held_out, self._processes,
            move=self._move, autocast=self._autocast, stopped=lambda: bool(self._signals.received),
        )  # fmt: skip

    def _log_epoch(self, log: RunLog, accuracy: Accuracy, averaged: Accuracy | None) -> None:
        place = self.place
        row = {
            "epoch": place.epoch + 1,
            "step": place.step,
            "train_loss": place.loss_sum / self.steps_per_epoch,
            "accuracy": accuracy.top1,
            "top5": accuracy.top5,
            "ema_accuracy": averaged and averaged.top1,
            "ema_top5": averaged and averaged.top5,
            "seconds": round(place.seconds, 3),
        }
        log.epoch(row)
        of_ema = f", of its average {averaged}" if averaged else ""
        log.say(
            f"epoch {row['epoch']}/{self._settings.epochs}: train loss {row['train_loss']:.4f}, accuracy on "
            f"{accuracy.images} held-out images {accuracy}{of_ema}, {_duration(place.seconds)}"
        )

    # ------------------------------------------------------------------------------ checkpoints

    def save(self) -> None:
        """Writes a checkpoint.

        Raises:
            Diverged: a weight is not finite.
            AgreedError: it, or the log, cannot be written.
        """
        self._look_at_losses()
        if not self.learner.is_finite():
            raise Diverged(f"after step {self.place.step} the weights are not finite. {self._advice()}")
        within = 0 < self.place.position < self.steps_per_epoch
        own = {"rng": checkpoint.rng_state(), "loader": data.loader_state(self._train) if within else None}
        everyone = self._processes.of_all(own)
        offsets = self._write(RunLog.offsets) or {}
        if self._processes.first:
            state = {
                "description": self._description,
                "settings": asdict(self._settings),
                "processes": everyone,
                "log_offsets": offsets,
                **asdict(self.place),
                **self.learner.state(),
            }
        self._processes.together(lambda: checkpoint.save(self._folder, state) if self._processes.first else None)
        self._since = time.perf_counter()

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from a checkpoint of the same network and settings."""
        self.learner.load_state(state)
        self.place = Place(**{name: state[name] for name in asdict(self.place)})
        self._restored = state["processes"][self._processes.rank]
        checkpoint.set_rng_state(self._restored["rng"])


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
