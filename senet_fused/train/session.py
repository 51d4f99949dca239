"""One run from its options to its last file: what is made of them, what is told, and what is left behind."""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import senet_fused

from ..arguments import RequestError
from . import checkpoint, curves, data, network
from .logs import RunLog, not_written, open_progress, writing
from .loop import Diverged, Limits, Trainer
from .processes import AgreedError, Processes, StopSignals, join
from .schedule import paper_rate, paper_step_epochs
from .settings import Settings, check_same
from .state import check_weights

__all__ = ["device_of", "settings_of", "train"]

_AMP = {"bf16": torch.bfloat16, "fp16": torch.float16, "none": torch.float32}
_WRITING_FAILED = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
_REDUCTION = 16  # of this package's networks
_EMA_SHARE = 0.1  # of the weights that a run begins with
_NAMED = 5  # of files that cannot be read


def device_of(args: argparse.Namespace) -> str:
    """--device, by default a GPU where there is one.

    Raises:
        RequestError: a GPU is asked for, and there is none.
    """
    there = torch.cuda.is_available()
    if args.device == "cuda" and not there:
        why = "this PyTorch is built without CUDA" if torch.version.cuda is None else "PyTorch finds no CUDA GPU"
        raise RequestError(f"--device cuda: {why} (torch {torch.__version__}); use --device cpu")
    return args.device or ("cuda" if there else "cpu")


def settings_of(args: argparse.Namespace, processes: int) -> Settings:
    """The options that change the result, with no default left open.

    Raises:
        RequestError: two of them do not go together.
    """
    if args.nesterov and args.momentum == 0:
        raise RequestError("--nesterov needs a --momentum above 0")
    if args.warmup >= args.epochs:
        raise RequestError(f"--warmup {args.warmup:g} is no shorter than --epochs {args.epochs}; make it shorter")
    batch = args.batch_size * args.accumulate * processes
    reduction = args.reduction or (None if ":" in args.model else _REDUCTION)
    return Settings(
        model=args.model, data=args.data, size=args.size, epochs=args.epochs, batch_size=args.batch_size,
        accumulate=args.accumulate, processes=processes, lr=args.lr or paper_rate(batch), momentum=args.momentum,
        weight_decay=args.weight_decay, nesterov=args.nesterov, schedule=args.schedule,
        step_epochs=args.step_epochs or paper_step_epochs(args.epochs), warmup=args.warmup,
        label_smoothing=args.label_smoothing, amp=args.amp, channels_last=args.channels_last, drop_path=args.drop_path,
        dropout=args.dropout, ema=args.ema, fuse=args.fuse, no_se=args.no_se, reduction=reduction,
        sync_batchnorm=args.sync_batchnorm, broken_images=args.broken_images, augment=not args.no_augment,
        seed=args.seed, device=args.device,
    )  # fmt: skip


def train(args: argparse.Namespace) -> int | str:
    """Runs it: "finished", "stopped" (--max-steps), "diverged", or the number of the signal that stopped it."""
    with join(args.device) as processes:
        try:
            with StopSignals(processes) as signals:
                return _train(args, processes, signals)
        except OSError as error:
            if error.errno not in _WRITING_FAILED:
                raise
            raise not_written(args.output, error) from error
        except torch.OutOfMemoryError as error:
            raise RequestError(
                f"out of GPU memory with --batch-size {args.batch_size} --accumulate {args.accumulate}: use a smaller "
                "--batch-size with an --accumulate as many times larger, or --amp bf16, in another --output"
            ) from error
        except Diverged as error:
            if processes.first:
                print(f"senet-fused train: {error}", file=sys.stderr)
            return "diverged"
        except AgreedError:
            if processes.first:
                raise
            raise SystemExit(2) from None


def _train(args: argparse.Namespace, processes: Processes, signals: StopSignals) -> int | str:
    folder = args.output

    def prepare() -> tuple[Settings, dict[str, Any] | None, data.Source, nn.Module]:
        settings = settings_of(args, processes.size)
        if processes.first:
            _refuse_another_run(folder, args.resume)
        state = _state_to_resume(args)
        if processes.first:
            _claim(folder)
        source = data.open_source(
            settings.data, size=settings.size, seed=settings.seed, broken=settings.broken_images,
            augment=settings.augment,
        )  # fmt: skip
        return settings, state, source, network.make_network(settings, len(source.classes), tuple(source.shape))

    settings, state, source, model = processes.together(prepare)
    classes, shape = len(source.classes), tuple(source.shape)
    description = network.describe(settings, classes, shape)

    model = _on_device(model, settings, processes)

    def check() -> None:
        if state is not None:
            checkpoint.check_model(state, description)
            check_same(state["settings"], settings)
            check_weights(state["model"], model)
        network.check_network(model, settings, classes, shape)

    processes.together(check)
    limits = Limits(args.save_every, args.log_every, args.max_steps)
    trainer = Trainer(
        settings, limits, model, description, source, processes, signals, folder,
        workers=args.workers, compiled=args.compile,
    )  # fmt: skip
    offsets = None
    if state is not None:
        trainer.restore(state)
        # Of another folder's logs they say nothing about what may lie in this one.
        offsets = state["log_offsets"] if _is_own(folder, args.resume) else None
    state = None  # as large as the network and its optimizer
    with _open_log(args, trainer, processes, offsets) as trainer.log:
        log = trainer.log
        if log is not None:
            _say_what(log, settings, trainer, source, processes, model)
        senet_fused.reset_call_counts()
        begin = time.perf_counter()
        end = trainer.run()
        seconds = time.perf_counter() - begin
        broken = processes.of_all([*data.broken_files(source.train), *data.broken_files(source.held_out)])

        def leave() -> None:
            if log is not None:
                with writing(folder):
                    _leave(log, trainer, folder, end, seconds)
                    _say_broken(log, sorted(set().union(*broken)))

        processes.together(leave)
        return end


@contextlib.contextmanager
def _open_log(
    args: argparse.Namespace, trainer: Trainer, processes: Processes, offsets: dict[str, int] | None
) -> Iterator[RunLog | None]:
    """The log, in the first process. Where it cannot be opened or closed, all processes are told."""

    def in_first(work: Callable[[], RunLog | None]) -> RunLog | None:
        def here() -> RunLog | None:
            with writing(args.output):
                return work() if processes.first else None

        return processes.together(here)

    def opened() -> RunLog:
        progress = open_progress(args.plain)
        try:
            return RunLog(
                args.output, progress, offsets=offsets, step=trainer.place.step, tensorboard=args.tensorboard == "on"
            )
        except OSError:
            progress.close()
            raise

    log = in_first(opened)
    try:
        yield log
    except BaseException:
        with contextlib.suppress(OSError):  # which would hide what has gone wrong first
            if log is not None:
                log.close()
        raise
    in_first(lambda: log.close())


def _state_to_resume(args: argparse.Namespace) -> dict[str, Any] | None:
    if args.resume is None:
        return None
    # Each process reads the file: it is the same for all, and nobody has to send it.
    return checkpoint.load(args.output if args.resume == Path("") else args.resume)


def _is_own(folder: Path, resume: Path | None) -> bool:
    """Whether the checkpoint to go on from is in the run's folder."""
    return resume is not None and (
        resume == Path("") or folder.resolve() in (resume.resolve(), resume.resolve().parent)
    )


def _refuse_another_run(folder: Path, resume: Path | None) -> None:
    """Raises RequestError if a run's checkpoint is there and is not the one to go on from."""
    own = _is_own(folder, resume)
    instead = "begins anew" if resume is None else f"goes on from {resume}"
    for name in (checkpoint.LAST, checkpoint.PREVIOUS):
        if (folder / name).exists() and not own:
            raise RequestError(
                f"{folder} holds the checkpoint {name} of another run: --resume goes on from it, "
                f"another --output {instead}"
            )


def _claim(folder: Path) -> None:
    """Makes the folder; raises RequestError unless the run can leave its files there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(f"cannot make the folder {folder}: {error.strerror or error}") from None
    if not os.access(folder, os.W_OK):
        raise RequestError(f"cannot write into the folder {folder}")


def _on_device(model: nn.Module, settings: Settings, processes: Processes) -> nn.Module:
    layout = torch.channels_last if settings.channels_last else torch.preserve_format
    return model.to(processes.device, memory_format=layout)


def _say_what(
    log: RunLog, settings: Settings, trainer: Trainer, source: data.Source, processes: Processes, model: nn.Module
) -> None:
    numbers = sum(p.numel() for p in model.parameters())
    dtype = next(model.parameters()).dtype if settings.amp == "none" else _AMP[settings.amp]
    choice = senet_fused.explain(torch.empty(0, device=processes.device, dtype=dtype))
    place, fallen = trainer.place, len(source.train) - trainer.steps_per_epoch * settings.effective_batch
    for line in (
        f"Model: {settings.model}, {numbers:,} parameters; SE: {network.se_layers(model, settings)}",
        f"Data: {settings.data}, {len(source.train)} images to train on and {len(source.held_out)} held out, of "
        f"{' x '.join(map(str, source.shape))}, {len(source.classes)} classes",
        f"Backend: {choice.backend} ({choice.reason})",
        f"Device: {processes.device.type}, {processes.size} process{'es' * (processes.size > 1)}, "
        f"{torch.get_num_threads()} CPU threads each; {settings.amp if settings.amp != 'none' else 'no'} autocast",
        f"Effective batch: {settings.effective_batch} = {settings.batch_size} x {settings.accumulate} accumulated "
        f"x {processes.size} process{'es' * (processes.size > 1)}; {trainer.steps_per_epoch} steps an epoch"
        + (f", each time without {fallen} images that do not fill a step" if fallen else ""),
        f"Learning rate: {settings.lr:g}, schedule {settings.schedule}",
    ):
        log.say(line)
    if (share := settings.ema**trainer.total_steps) > _EMA_SHARE:
        log.say(
            f"Warning: --ema {settings.ema:g} averages over about {1 / (1 - settings.ema):,.0f} steps, and this run "
            f"has {trainer.total_steps:,}: {share:.0%} of its average are the first step's weights. Use a smaller one"
        )
    if place.step:
        log.say(f"Resumed behind step {place.step} of {trainer.total_steps}, in epoch {place.epoch + 1}")


def _leave(log: RunLog, trainer: Trainer, folder: Path, end: int | str, seconds: float) -> None:
    place, learner = trainer.place, trainer.learner
    written = [f"{folder / checkpoint.LAST}"]
    if end == "finished":
        _save_weights(folder / "model.pt", learner.network)
        written.append("model.pt")
        if learner.ema is not None:
            _save_weights(folder / "model_ema.pt", learner.ema.module)
            written.append("model_ema.pt")
    log.offsets()  # what is drawn is read from the files
    try:
        curves.draw(folder)
        written.append("curves.png")
    except ImportError as error:
        log.say(f"No picture: {error}. pip install matplotlib")
    counts = ", ".join(f"{name} {count} times" for name, count in sorted(senet_fused.call_counts().items()))
    log.say(f"Kernels that ran: {counts or 'none of this package'}")
    best = f"; best accuracy {place.best:.2%}" if place.best >= 0 else ""
    where = {"finished": "Finished", "stopped": "Stopped by --max-steps"}.get(end, f"Stopped by signal {end}")
    log.say(f"{where} at step {place.step} of {trainer.total_steps} after {seconds:.1f} s{best}")
    log.say(f"Written: {', '.join(written)}" + ("" if end == "finished" else "; --resume goes on from there"))


def _say_broken(log: RunLog, broken: list[str]) -> None:
    if broken:
        files = f"{len(broken)} file{'s' * (len(broken) > 1)}"
        more = ", ..." if len(broken) > _NAMED else ""
        log.say(f"Skipped, for they cannot be read: {files}: {', '.join(broken[:_NAMED])}{more}")


def _save_weights(path: Path, model: nn.Module) -> None:
    """The state dict, for torch.load(weights_only=True), in one move.

    Raises:
        RequestError: it cannot be written.
    """
    new = path.with_suffix(".new")
    try:
        torch.save(model.state_dict(), new)
        os.replace(new, path)
    except (OSError, RuntimeError) as error:  # torch raises the latter for a full disk
        new.unlink(missing_ok=True)
        raise RequestError(
            f"cannot write the weights {path}: {error}; the checkpoint is complete: make room, and --resume writes them"
        ) from error
