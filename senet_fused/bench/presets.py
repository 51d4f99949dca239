"""What --preset of `senet-fused bench model` stands for, and the options that nobody has given."""

from __future__ import annotations

import argparse

from ..arguments import RequestError, positive

__all__ = ["LARGEST", "PRESETS", "batch_size", "resolve"]

# The original networks of Hu et al. by timm's names; all take 3x224x224.
PRESETS = {
    "senet154": "legacy_senet154",
    "se_resnext101": "legacy_seresnext101_32x4d",
    "se_resnet50": "legacy_seresnet50",
}
LARGEST = "max"  # the largest batch that fits in a GPU's memory

_MODES = ["inference", "training"]
_PLAIN = {"mode": _MODES, "batch": [8], "dtype": ["float32"], "layout": ["contiguous"], "providers": None}
_PRESET = {
    "cpu": {
        "batch": [1, 4, 8],
        "dtype": ["float32"],
        "providers": ["stock", "compile", "fused", "tails", "no-se"],
    },
    "cuda": {
        "batch": [32, 64, 128, LARGEST],
        "dtype": ["bfloat16"],  # by autocast
        "providers": ["stock", "compile", "graph", "fused", "tails", "tails+compile", "tails+graph", "no-se"],
    },
}


def batch_size(text: str) -> int | str:
    """The argparse type of --batch."""
    if text == LARGEST:
        return LARGEST
    try:
        return positive(int)(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}, and not {LARGEST!r} either") from None


def resolve(args: argparse.Namespace) -> None:
    """Fills in the options that are None: from the presets where there are any, else the command's own defaults.

    --dtype and --amp belong together: who gives either has said both.

    Raises:
        RequestError: there is no network, or --batch max on a CPU.
    """
    presets = list(dict.fromkeys(args.preset or ()))
    if not args.models and not presets:
        raise RequestError(f"which network? Give names in front of the options, or --preset {' | '.join(PRESETS)}")
    if not args.models:
        args.models = [PRESETS[name] for name in presets]
    defaults = dict(_PLAIN)
    if presets:
        defaults |= {"layout": ["channels_last"]} | _PRESET[args.device]
        if args.dtype is None and args.device == "cuda":
            args.amp = True
    if args.dtype is None and args.amp and not presets:
        raise RequestError("--amp is for --dtype bfloat16 or float16: autocast to float32 changes nothing")
    if args.dtype is None and args.amp:
        args.dtype = ["bfloat16"]
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if LARGEST in args.batch and args.device != "cuda":
        raise RequestError(
            f"--batch {LARGEST} is the largest batch that fits in a GPU's memory, and needs --device cuda; with "
            f"--device {args.device} give numbers, for instance --batch 1 8 32"
        )
