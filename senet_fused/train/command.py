"""``senet-fused train``: its options.

Alone, or as several processes:

    senet-fused train --model se_resnet20 --data digits --epochs 10
    torchrun --nproc-per-node 4 -m senet_fused train --model senet154 --data imagefolder:/data/imagenet --device cuda
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..arguments import RequestError

__all__ = ["SETTINGS", "add_arguments", "run", "settings_of"]

RESUME_LAST = Path("")
_SIGNAL_STATUS = 128  # added to a signal's number, as shells do
# The options that change the result, and the number of processes. A checkpoint holds them, and a run that resumes from
# it must have the same.
SETTINGS = (
    "model data size augment fuse no_se reduction seed epochs batch_size accumulate processes lr momentum weight_decay "
    "nesterov schedule step_epochs warmup amp label_smoothing drop_path dropout ema device channels_last sync_batchnorm"
).split()


def _number(kind: type, least: float, limit: float = math.inf, *, exclusive: bool = False) -> Callable[[str], Any]:
    """The argparse type of a number from ``least`` (without it, if exclusive) to below ``limit``."""
    wanted = "an integer" if kind is int else "a number"
    wanted += f" {'>' if exclusive else '>='} {least:,}" + (f" and < {limit:,}" if limit < math.inf else "")

    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not least <= value < limit or exclusive and value == least:
            raise argparse.ArgumentTypeError(f"must be {wanted}, got {text!r}")
        return value

    return read


_NATURAL, _FRACTION, _AMOUNT = _number(int, 1), _number(float, 0, 1), _number(float, 0)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options to a parser."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = (__doc__ or "").partition("\n\n")[2]

    def group(title: str) -> Callable[..., None]:
        within = parser.add_argument_group(title)

        def add(flag: str, values: Any, default: Any, text: str, **options: Any) -> None:
            """``values``: a tuple of choices, an argparse type, or bool for a switch."""
            if values is bool:
                options["action"] = "store_true" if flag.startswith("--no-") else argparse.BooleanOptionalAction
            else:
                options["choices" if isinstance(values, tuple) else "type"] = values
            if default is not None and default is not False and "default" not in text:
                text += " (default: %(default)s)"
            within.add_argument(flag, default=default, help=text, **options)

        return add

    add = group("model and data")
    text = "a network of senet_fused.models (senet154, se_resnet50, se_resnet20, ...), timm:NAME, torchvision:NAME, or "
    text += "FILE.py:FACTORY, a function that takes num_classes and in_chans, or nothing, and returns a module"
    add("--model", str, None, text, metavar="NAME", required=True)
    text = "digits, cifar10:DIR, imagefolder:DIR (with DIR/train/CLASS/* and DIR/val/CLASS/*), synthetic, or "
    text += "synthetic:CLASSES,TRAIN,HELD_OUT"
    add("--data", str, None, text, metavar="SPEC", required=True)
    add("--size", _NATURAL, None, "side of the images (default: that of the data)", metavar="PIXELS")
    add("--augment", bool, True, "augment the training images")
    text = "SE layers run fused; tails: also BatchNorm -> SE -> + shortcut -> ReLU"
    add("--fuse", ("none", "se", "tails"), "se", text)
    add("--no-se", bool, False, "the same network without SE layers, for comparison")
    add("--reduction", _NATURAL, None, "of the SE layers of senet_fused.models (default: 16)", metavar="R")
    text = "of weights, order, augmentation and dropout"
    add("--seed", _number(int, 0, 2**32), 0, text, metavar="N")

    add = group("optimization")
    add("--epochs", _NATURAL, 100, "passes over the training images", metavar="N")
    text = "images of one forward pass of one process; the effective batch is N x --accumulate x processes"
    add("--batch-size", _NATURAL, 32, text, metavar="N")
    add("--accumulate", _NATURAL, 1, "forward passes per optimizer step", metavar="N")
    text = "peak learning rate (default: 0.6 x effective batch / 1024, as SENet's authors)"
    add("--lr", _number(float, 0, exclusive=True), None, text, metavar="RATE")
    add("--momentum", _FRACTION, 0.9, "of SGD", metavar="M")
    add("--weight-decay", _AMOUNT, 1e-4, "of all weights", metavar="D")
    add("--nesterov", bool, False, "Nesterov momentum")
    text = "paper: the rate falls to a tenth every --step-epochs; cosine: along half a cosine"
    add("--schedule", ("paper", "cosine"), "paper", text)
    add("--step-epochs", _NATURAL, None, "(default: 30 of 100, in proportion to --epochs)", metavar="N")
    add("--warmup", _AMOUNT, 0.0, "of a linear rise to the peak; may be a fraction", metavar="EPOCHS")
    add("--amp", ("bf16", "fp16", "none"), "none", "autocast; fp16 with a gradient scaler")
    add("--label-smoothing", _FRACTION, 0.0, "share of the target that is spread over all classes", metavar="E")
    text = "stochastic depth, per sample: the rate of the last block, to which it rises linearly"
    add("--drop-path", _FRACTION, 0.0, text, metavar="RATE")
    add("--dropout", _FRACTION, None, "before the classifier (default: the network's own)", metavar="RATE")
    text = (
        "also keep an exponential moving average of weights and statistics, over about 1/(1-DECAY) steps (default: off)"
    )
    add("--ema", _FRACTION, 0, text, metavar="DECAY")

    add = group("device")
    add("--device", ("cpu", "cuda"), None, "(default: cuda if there is a GPU)")
    add("--channels-last", bool, True, "memory layout")
    add("--sync-batchnorm", bool, False, "BatchNorm statistics over the images of all processes")

    add = group("run (may differ when it is resumed)")
    add("--output", Path, None, "(default: runs/MODEL-DATA)", metavar="DIR")
    text = "continue from the last checkpoint in --output, or from PATH"
    add("--resume", Path, None, text, metavar="PATH", nargs="?", const=RESUME_LAST)
    add(
        "--save-every",
        _NATURAL,
        0,
        "also write checkpoints within an epoch (default: only after each)",
        metavar="STEPS",
    )
    add("--log-every", _NATURAL, 10, "fetch, check and log losses; each step has a row all the same", metavar="STEPS")
    add("--max-steps", _NATURAL, None, "stop after the Nth step of the run, with a checkpoint", metavar="N")
    add("--tensorboard", ("on", "off"), "on", "write its events")
    add("--threads", _NATURAL, None, "CPU threads of each process (default: PyTorch's choice)", metavar="N")
    text = "processes that load images: N for the training images and N for the held-out ones"
    add("--workers", _number(int, 0), 0, text, metavar="N")
    add("--compile", bool, False, "torch.compile the network")
    text = (
        "the same bits every time, or an error; a resumed run ends in the bits of one that was never stopped only with "
    )
    add("--deterministic", bool, False, text + "it on a GPU, and with the same --threads on a CPU")


def settings_of(args: argparse.Namespace, processes: int) -> argparse.Namespace:
    """The options of SETTINGS, with no default left open.

    Raises:
        RequestError: two of them exclude each other.
    """
    from .schedule import paper_rate, paper_step_epochs

    if args.nesterov and args.momentum == 0:
        raise RequestError("--nesterov needs --momentum > 0, got 0")
    if args.warmup >= args.epochs:
        raise RequestError(f"--warmup must be < --epochs {args.epochs}, got {args.warmup:g}")
    resolved = {
        "processes": processes,
        "lr": args.lr or paper_rate(args.batch_size * args.accumulate * processes),
        "step_epochs": args.step_epochs or paper_step_epochs(args.epochs),
        "reduction": args.reduction or (None if ":" in args.model else 16),
    }
    given = vars(args) | resolved
    return argparse.Namespace(**{name: given[name] for name in SETTINGS})


def run(args: argparse.Namespace) -> int:
    """Trains. Returns 0; 1 if the training diverged; 130 or 143 after Ctrl-C or SIGTERM, with a checkpoint.

    Raises:
        RequestError: what is asked for cannot be done.
    """
    from . import session

    args.output = args.output or Path("runs", _folder_name(args.model, args.data))
    end = session.train(args)
    return _SIGNAL_STATUS + end if isinstance(end, int) else int(end == "diverged")


def _folder_name(model: str, data: str) -> str:
    """MODEL-DATA, each without the folders of its path."""
    parts = (*model.rpartition(":"), "-", *data.partition(":"))
    return re.sub(r"[^\w.+-]+", "_", "".join(Path(part).resolve().name for part in parts if part))
