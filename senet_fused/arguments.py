"""What the subcommands share: their error, and the checks of arguments. No torch until it is needed."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

__all__ = ["RequestError", "check_device", "positive", "require_writable"]


class RequestError(ValueError):
    """What was asked for cannot be done; the message says why and what to write instead."""


def positive(kind: type) -> Any:
    """The argparse type of a finite number above zero."""

    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = -1
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text!r} is no positive {'integer' if kind is int else 'number'}")
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
