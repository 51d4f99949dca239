"""``senet-fused train``: its options, what is refused before anything is trained, and what it tells.

Alone, or as several processes:

    senet-fused train --model se_resnet20 --data digits --epochs 10
    torchrun --nproc-per-node 4 -m senet_fused train --model senet154 --data imagefolder:/data/imagenet --device cuda
"""

from __future__ import annotations

import argparse
import contextlib
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..arguments import positive

__all__ = ["add_arguments", "run"]

RESUME_LAST = Path("")
_SIGNAL_STATUS = 128  # added to a signal's number, as shells do


def _number(kind: Callable[[str], Any], low: float, high: float, words: str) -> Callable[[str], Any]:
    """The argparse type of low <= number < high."""

    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value < high:
            raise argparse.ArgumentTypeError(f"{text!r} is not {words}")
        return value

    return read


def _rate(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no learning rate: it must be above 0 (at 0 nothing is learnt)")
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options to a parser."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = (__doc__ or "").partition("\n\n")[2]
    _add_what(parser.add_argument_group("what is trained, on what"))
    _add_how(parser.add_argument_group("how"))
    _add_regularisation(parser.add_argument_group("regularisation and averaging"))
    _add_where(parser.add_argument_group("where and how fast"))
    _add_output(parser.add_argument_group("output"))


def _add_what(group: argparse._ArgumentGroup) -> None:
    add, natural = group.add_argument, positive(int)
    add("--model", required=True, metavar="NAME",
        help="a network of senet_fused.models (senet154, se_resnet50, se_resnet20, ...), timm:NAME, or FILE.py:"
        "FACTORY, a function that takes num_classes and in_chans, or nothing, and returns a module")  # fmt: skip
    add("--data", required=True, metavar="SPEC",
        help="digits, cifar10:DIR, imagefolder:DIR (with DIR/train/CLASS/* and DIR/val/CLASS/*), synthetic, or "
        "synthetic:CLASSES,TRAIN,HELD_OUT")  # fmt: skip
    add("--size", type=natural, metavar="PIXELS", help="side of the images (default: the source's own)")
    add("--no-augment", action="store_true", help="train on the images as they are")
    add("--broken-images", choices=("raise", "skip"), default="raise",
        help="what to do about files that cannot be read (default: %(default)s)")  # fmt: skip
    add("--fuse", choices=("none", "se", "tails"), default="se",
        help="run SE layers fused; with tails also BatchNorm -> SE -> + shortcut -> ReLU (default: %(default)s)",
        )  # fmt: skip
    add("--no-se", action="store_true", help="the twin without SE layers, to compare with")
    add("--reduction", type=natural, metavar="R", help="of the SE layers of this package's networks (default: 16)")
    add("--seed", type=_number(int, 0, 2**32, "a whole number from 0 to 2^32 - 1"), default=0, metavar="N",
        help="of weights, order, augmentation and dropout (default: %(default)s)")  # fmt: skip


def _add_how(group: argparse._ArgumentGroup) -> None:
    add, natural = group.add_argument, positive(int)
    share = _number(float, 0, 1, "a number from 0 to below 1")
    amount = _number(float, 0, math.inf, "a number from 0 on")
    add("--epochs", type=natural, default=100, metavar="N", help="times through the images (default: %(default)s)")
    add("--batch-size", type=natural, default=32, metavar="N",
        help="images of one forward pass of one process; a step takes N x --accumulate x processes of them, the "
        "effective batch (default: %(default)s)")  # fmt: skip
    add("--accumulate", type=natural, default=1, metavar="N", help="forward passes of a step (default: %(default)s)")
    add("--lr", type=_rate, metavar="RATE",
        help="peak learning rate, above 0 (default: 0.6 x effective batch / 1024, as SENet's authors had it)",
        )  # fmt: skip
    add("--momentum", type=share, default=0.9, metavar="M", help="of SGD (default: %(default)s)")
    add("--weight-decay", type=amount, default=1e-4, metavar="D", help="of all weights (default: %(default)s)")
    add("--nesterov", action=argparse.BooleanOptionalAction, default=False, help="Nesterov's momentum")
    add("--schedule", choices=("paper", "cosine"), default="paper",
        help="paper: the rate falls to a tenth every --step-epochs; cosine: along half a cosine (default: %(default)s)",
        )  # fmt: skip
    add("--step-epochs", type=natural, metavar="N", help="(default: 30 of 100, in proportion to --epochs)")
    add("--warmup", type=amount, default=0.0, metavar="EPOCHS",
        help="of a linear rise to the peak, may be a fraction (default: %(default)g)")  # fmt: skip
    add("--amp", choices=("bf16", "fp16", "none"), default="none",
        help="mixed precision; fp16 scales the loss (default: %(default)s)")  # fmt: skip


def _add_regularisation(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    share = _number(float, 0, 1, "a number from 0 to below 1")
    add("--label-smoothing", type=share, default=0.0, metavar="E", help="(default: %(default)g)")
    add("--drop-path", type=share, default=0.0, metavar="RATE",
        help="stochastic depth, per sample: the rate of the last block, to which it rises linearly (default: "
        "%(default)g)")  # fmt: skip
    add("--dropout", type=share, metavar="RATE", help="in front of the classifier (default: the network's own)")
    add("--ema", type=share, default=0.0, metavar="DECAY",
        help="also keep an exponential moving average of weights and statistics, over about 1/(1-DECAY) steps: "
        "0.9999 is for runs of many times 10,000 steps (default: off)")  # fmt: skip


def _add_where(group: argparse._ArgumentGroup) -> None:
    add, natural = group.add_argument, positive(int)
    whole = _number(int, 0, math.inf, "a whole number from 0 on")
    layout = group.add_mutually_exclusive_group()
    add("--device", choices=("cpu", "cuda"), help="(default: cuda where there is a GPU)")
    add("--threads", type=natural, metavar="N", help="CPU threads of each process (default: PyTorch's choice)")
    add("--workers", type=whole, default=0, metavar="N",
        help="processes that load images, N for the training images and N for the held-out ones (default: %(default)s)",
        )  # fmt: skip
    layout.add_argument("--channels-last", action="store_true", default=True, help="memory layout (the default)")
    layout.add_argument("--contiguous", action="store_false", dest="channels_last", help="the other one")
    add("--compile", action="store_true", help="torch.compile the network")
    add("--sync-batchnorm", action="store_true", help="BatchNorm's statistics of all processes' images together")
    add("--deterministic", action="store_true",
        help="the same bits every time, or an error; on a GPU a resumed run ends in the bits of one that was never "
        "stopped only with it, and on a CPU only with the same --threads")  # fmt: skip


def _add_output(group: argparse._ArgumentGroup) -> None:
    add, natural = group.add_argument, positive(int)
    add("--output", type=Path, metavar="DIR", help="(default: runs/MODEL-DATA)")
    add("--resume", type=Path, nargs="?", const=RESUME_LAST, metavar="PATH",
        help="go on from the last checkpoint in --output, or from PATH")  # fmt: skip
    add("--save-every", type=natural, default=0, metavar="STEPS",
        help="write checkpoints also within an epoch (default: only after each)")  # fmt: skip
    add("--log-every", type=natural, default=10, metavar="STEPS",
        help="fetch losses from the device, check and log them: one row a step all the same (default: %(default)s)",
        )  # fmt: skip
    add("--max-steps", type=natural, metavar="N", help="stop after the Nth step of the run, with a checkpoint")
    add("--tensorboard", choices=("on", "off"), default="on", help="write its events (default: %(default)s)")
    add("--plain", action="store_true", help="lines instead of a progress bar")


def run(args: argparse.Namespace) -> int:
    """Trains. Returns 0; 1 if the training diverged; 130 or 143 after Ctrl-C or SIGTERM, with a checkpoint.

    Raises:
        RequestError: what is asked for cannot be done.
    """
    from . import session

    args.device = session.device_of(args)
    args.output = args.output or Path("runs", _folder_name(args.model, args.data))
    with _process_settings(args):
        end = session.train(args)
    return _SIGNAL_STATUS + end if isinstance(end, int) and end else int(end == "diverged")


def _folder_name(model: str, data: str) -> str:
    """Both are told by it; of a path its last part is."""
    prefix, _, rest = model.rpartition(":")
    if prefix.endswith(".py"):
        model = f"{Path(prefix).name}:{rest}"
    kind, _, where = data.partition(":")
    halves = model, f"{kind}:{Path(where).resolve().name}" if where else kind
    return "-".join(re.sub(r"[^\w.+-]+", "_", half).strip("_") for half in halves)


@contextlib.contextmanager
def _process_settings(args: argparse.Namespace) -> Iterator[None]:
    """What the options set for the whole process, and as it was afterwards."""
    import os

    import torch

    threads, cudnn = torch.get_num_threads(), torch.backends.cudnn
    deterministic, benchmark = torch.are_deterministic_algorithms_enabled(), cudnn.benchmark
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS refuses
        torch.use_deterministic_algorithms(True)
    cudnn.benchmark = not args.deterministic
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)
        cudnn.benchmark = benchmark
