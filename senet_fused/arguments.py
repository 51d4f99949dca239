"""What the commands share: their error, and checks of arguments. Imports torch only where it is needed."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["RequestError", "between", "check_device", "positive", "require_writable"]


class RequestError(ValueError):
    """The request cannot be met; the message says why, and what to write instead."""


def positive(kind: type) -> Callable[[str], Any]:
    """The argparse type of a finite number above zero."""
    number = "integer" if kind is int else "number"
    return _checked(kind, lambda value: 0 < value < float("inf"), f"a positive {number}")


def between(kind: type, low: float, high: float) -> Callable[[str], Any]:
    """The argparse type of a number from low to high, inclusive."""
    number = "an integer" if kind is int else "a number"
    return _checked(kind, lambda value: low <= value <= high, f"{number} from {low} to {high}")


def _checked(kind: type, accepts: Callable[[Any], bool], wanted: str) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        if not accepts(value):
            raise argparse.ArgumentTypeError(f"must be {wanted}, got {text!r}")
        return value

    return read


def require_writable(path: Path) -> None:
    """Raises RequestError unless a file can be written there; leaves nothing behind."""
    if path.is_dir():
        raise RequestError(f"cannot write {path}: it is a folder")
    existed = path.exists()
    try:
        with path.open("ab"):
            pass
    except OSError as error:
        raise RequestError(f"cannot write {path}: {error.strerror or error}") from None
    if not existed:
        path.unlink()


def check_device(args: argparse.Namespace) -> None:
    """Raises RequestError unless --device and --backend can be served here."""
    import torch

    from . import backends

    if args.device == "cuda" and not torch.cuda.is_available():
        why = "this PyTorch is built without CUDA" if torch.version.cuda is None else "PyTorch finds no CUDA GPU"
        raise RequestError(f"--device cuda: {why} (torch {torch.__version__}); use --device cpu")
    if args.backend not in (None, "auto"):
        try:
            known = {status.name: status for status in backends.status()}
        except RuntimeError as error:
            raise RequestError(f"backend {args.backend!r}: {error}") from None
        if args.backend not in known:
            raise RequestError(f"unknown backend {args.backend!r}; known: {', '.join(['auto', *known])}")
        if not known[args.backend].available:
            raise RequestError(f"backend {args.backend!r} cannot run here: {known[args.backend].reason}")
