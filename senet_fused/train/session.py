"""One run from its options to its last file."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

import senet_fused

from ..arguments import RequestError
from . import checkpoint, command, data, network
from .checkpoint import CheckpointError
from .logs import RunLog
from .loop import DTYPES, Diverged, Limits, Trainer
from .processes import CollectiveError, Processes, StopSignals, join

__all__ = ["train"]

# What PyTorch says in the first step of options that do not suit the network, and what to do.
_ADVICE = {
    "SyncBatchNorm expected": "on CPUs --sync-batchnorm works only for BatchNorms in block tails: use --fuse tails, if "
    "all of the network's are in one, or leave it out",
    "more than 1 value per channel": "use a --batch-size > 1 (--accumulate does not help), or larger images (--size)",
}


def train(args: argparse.Namespace) -> int | str:
    """Runs it: "finished", "stopped" (--max-steps), "diverged", or the number of the signal that stopped it."""
    args.device = _device(args.device)
    _configure_torch(args)
    with join(args.device) as processes:
        try:
            with StopSignals(processes) as signals:
                return _train(args, processes, signals)
        except torch.OutOfMemoryError as error:
            raise RequestError(
                f"out of GPU memory with --batch-size {args.batch_size} --accumulate {args.accumulate}: use a smaller "
                "--batch-size with an --accumulate as many times larger, or --amp bf16, in another --output"
            ) from error
        except Diverged as error:
            if processes.first:
                print(f"senet-fused train: {error}", file=sys.stderr)
            return "diverged"
        except CollectiveError:
            if processes.first:
                raise
            raise SystemExit(2) from None


def _device(name: str | None) -> str:
    """By default a GPU if there is one. Raises RequestError if one is asked for and there is none."""
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        why = "this PyTorch is built without CUDA" if torch.version.cuda is None else "PyTorch finds no CUDA GPU"
        raise RequestError(f"--device cuda: {why} (torch {torch.__version__}); use --device cpu")
    return name or ("cuda" if available else "cpu")


def _configure_torch(args: argparse.Namespace) -> None:
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS refuses
    torch.use_deterministic_algorithms(args.deterministic)
    torch.backends.cudnn.benchmark = not args.deterministic


def _train(args: argparse.Namespace, processes: Processes, signals: StopSignals) -> int | str:
    folder = args.output
    own = args.resume is not None and (  # whether the checkpoint to resume from is in the run's folder
        args.resume == command.RESUME_LAST or folder.resolve() in (args.resume.resolve(), args.resume.resolve().parent)
    )
    trainer, source = _make_trainer(args, own, processes, signals)
    place = trainer.place
    rows = {"step": place.step, "epoch": place.epoch} if own else {"step": 0, "epoch": 0}
    tensorboard = args.tensorboard == "on"
    log = processes.collective(lambda: RunLog(folder, **rows, tensorboard=tensorboard) if processes.first else None)
    try:
        trainer.log = log
        if log is not None:
            _describe(log, trainer, source, processes)
        senet_fused.reset_call_counts()
        begin = time.perf_counter()
        end = _run(trainer)
        seconds = time.perf_counter() - begin

        def finish() -> None:
            if log is not None:
                _finish(log, trainer, folder, end, seconds)
                log.close()

        processes.collective(finish)
    except BaseException:
        if log is not None:
            with contextlib.suppress(OSError):  # it would hide the first error
                log.close()
        raise
    return end


def _run(trainer: Trainer) -> int | str:
    try:
        return trainer.run()
    except ValueError as error:
        advice = [text for reason, text in _ADVICE.items() if reason in str(error)]
        if isinstance(error, RequestError) or not advice:
            raise
        raise CollectiveError(f"{error}: {advice[0]}") from error


def _make_trainer(
    args: argparse.Namespace, own: bool, processes: Processes, signals: StopSignals
) -> tuple[Trainer, data.Source]:
    def prepare() -> tuple[argparse.Namespace, dict[str, Any] | None, data.Source, nn.Module]:
        settings = command.settings_of(args, processes.size)
        if processes.first and not own:
            _refuse_another_run(args.output, args.resume)
        state = None
        if args.resume is not None:  # each process reads the file
            state = checkpoint.load(args.output if args.resume == command.RESUME_LAST else args.resume)
            _require_same(state["settings"], settings)
        if processes.first:
            try:
                args.output.mkdir(parents=True, exist_ok=True)
            except FileExistsError:
                raise RequestError(f"--output must be a folder, got the file {args.output}") from None
        source = data.open_source(settings.data, size=settings.size, seed=settings.seed, augment=settings.augment)
        model = network.make_network(settings, len(source.classes), source.shape[0])
        model.to(
            processes.device, memory_format=torch.channels_last if settings.channels_last else torch.preserve_format
        )
        network.check_network(model, settings.model, len(source.classes), source.shape)
        return settings, state, source, model

    settings, state, source, model = processes.collective(prepare)
    limits = Limits(args.save_every, args.log_every, args.max_steps)
    trainer = Trainer(
        settings, limits, model, source, processes, signals, args.output, workers=args.workers, compiled=args.compile
    )
    if state is not None:
        processes.collective(lambda: trainer.restore(state))
    return trainer, source


def _refuse_another_run(folder: Path, resume: Path | None) -> None:
    """Raises RequestError if the folder holds a checkpoint, which is not the one to resume from."""
    for name in (checkpoint.LAST, checkpoint.PREVIOUS):
        if (folder / name).exists():
            start = "begins anew" if resume is None else f"continues from {resume}"
            raise RequestError(
                f"{folder} holds the checkpoint {name} of another run: --resume continues it, another --output {start}"
            )


def _require_same(saved: Mapping[str, Any], settings: argparse.Namespace) -> None:
    """Raises CheckpointError if a run with other settings wrote the checkpoint; names both values of each."""
    different = [
        f"--{name.replace('_', '-')} was {saved.get(name)} and is {value}"
        for name, value in vars(settings).items()
        if saved.get(name) != value
    ]
    if different:
        text = "; ".join(different).replace("--processes", "the number of processes")
        raise CheckpointError(
            f"a run must resume with the settings of its checkpoint: {text}. Use the former, or begin a new run in "
            "another --output"
        )


def _describe(log: RunLog, trainer: Trainer, source: data.Source, processes: Processes) -> None:
    settings, model, place = trainer.settings, trainer.network, trainer.place
    dtype = DTYPES.get(settings.amp, next(model.parameters()).dtype)
    choice = senet_fused.explain(torch.empty(0, device=processes.device, dtype=dtype))
    several = f"{processes.size} process{'es' * (processes.size > 1)}"
    left_out = len(source.train) - trainer.steps_per_epoch * trainer.effective_batch
    tails = sum(isinstance(module, senet_fused.FusedSETail) for module in model.modules())
    layers = "none (--no-se)" if settings.no_se else senet_fused.fuse_report(model).summary
    for line in (
        f"Model: {settings.model}, {sum(p.numel() for p in model.parameters()):,} parameters; SE: {layers}"
        + (f"; {tails} FusedSETail" if tails else ""),
        f"Data: {settings.data}, {len(source.train)} training and {len(source.held_out)} held-out images of "
        f"{' x '.join(map(str, source.shape))}, {len(source.classes)} classes",
        f"Backend: {choice.backend} ({choice.reason})",
        f"Device: {processes.device.type}, {several}, {torch.get_num_threads()} CPU threads each; --amp {settings.amp}",
        f"Effective batch: {trainer.effective_batch} = {settings.batch_size} x {settings.accumulate} accumulated x "
        f"{several}; {trainer.steps_per_epoch} steps per epoch"
        + (f", each without {left_out} images that do not fill a step" if left_out else ""),
        f"Learning rate: {settings.lr:g}, schedule {settings.schedule}",
    ):
        log.say(line)
    if (share := settings.ema**trainer.total_steps) > 0.1:
        log.say(
            f"Warning: --ema {settings.ema:g} averages over about {1 / (1 - settings.ema):,.0f} steps, and this run "
            f"has {trainer.total_steps:,}: {share:.0%} of its average are the first step's weights. Use a smaller one"
        )
    if place.step:
        log.say(f"Resumed after step {place.step} of {trainer.total_steps}, in epoch {place.epoch + 1}")


def _finish(log: RunLog, trainer: Trainer, folder: Path, end: int | str, seconds: float) -> None:
    place = trainer.place
    weights = {}
    if end == "finished":
        weights["model.pt"] = trainer.network
        if trainer.ema is not None:
            weights["model_ema.pt"] = trainer.ema.module
    for name, model in weights.items():
        checkpoint.write(folder / name, model.state_dict())
    counts = ", ".join(f"{name} {count} times" for name, count in sorted(senet_fused.call_counts().items()))
    log.say(f"Kernels that ran: {counts or 'none of this package'}")
    best = f"; best accuracy {place.best:.2%}" if place.best >= 0 else ""
    where = {"finished": "Finished", "stopped": "Stopped by --max-steps"}.get(end, f"Stopped by signal {end}")
    log.say(f"{where} at step {place.step} of {trainer.total_steps} after {seconds:.1f} s{best}")
    written = ", ".join([str(folder / checkpoint.LAST), *weights])
    log.say(f"Written: {written}" + ("" if end == "finished" else "; --resume continues from there"))
