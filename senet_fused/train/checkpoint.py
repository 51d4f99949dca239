"""Checkpoints of a training run: a kill at any instant leaves a complete one, and a damaged one is never loaded.

A folder holds two: last.pt, and previous.pt, the one before it. Each is a file of ``torch.save`` that
``torch.load(weights_only=True)`` reads, so loading one runs no code that came with it. It is a zip file, and the CRC-32
of each of its members reveals damage.
"""

from __future__ import annotations

import io
import os
import random
import shutil
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy
import torch

from ..arguments import RequestError

__all__ = ["LAST", "PREVIOUS", "CheckpointError", "load", "locate", "rng_state", "save", "set_rng_state", "write"]

LAST, PREVIOUS = "last.pt", "previous.pt"
_FORMAT, _VERSION = "senet-fused training checkpoint", 1


class CheckpointError(RequestError):
    """A checkpoint cannot be written, read or used; the message says why and what to do."""


def write(path: Path, content: Any, keep: Path | None = None) -> None:
    """``torch.save``, atomically: killed at any instant, it leaves the file as it was, or complete and new.

    Args:
        content: what ``torch.load(weights_only=True)`` reads.
        keep: where the former file is moved, immediately before the new one takes its place. An error leaves both
            as they were.

    Raises:
        CheckpointError: the file cannot be written, or could not be read back.
    """
    buffer = io.BytesIO()
    torch.save(content, buffer)
    data = buffer.getbuffer()
    new = path.with_name(f"{path.name}.new")
    try:
        try:
            with new.open("wb") as file:
                rest = data
                while rest:
                    rest = rest[os.write(file.fileno(), rest) :]
                os.fsync(file.fileno())
            torch.load(new, map_location="cpu", weights_only=True, mmap=True)  # mapped: reads no tensors
            if keep is not None and path.exists():
                os.replace(path, keep)
            os.replace(new, path)
        except BaseException:
            with suppress(OSError):
                new.unlink()
            raise
        _sync_folder(path.parent)
    except OSError as error:
        free = f"{shutil.disk_usage(path.parent).free:,}" if path.parent.is_dir() else "none"
        raise CheckpointError(
            f"cannot save {path}: {error.strerror or error}; {len(data):,} bytes are needed, {free} are "
            "free. The former file is unchanged: make room or make the folder writable, then --resume"
        ) from error
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(
            f"cannot save {path}: torch.load(weights_only=True) could not read it: {reason}"
        ) from error


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems cannot, and keep names by themselves
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save(folder: Path, state: Mapping[str, Any]) -> None:
    """Writes a state to last.pt; the former last.pt becomes previous.pt. Raises as :func:`write`."""
    content = {"format": _FORMAT, "version": _VERSION, "state": dict(state)}
    write(folder / LAST, content, keep=folder / PREVIOUS)


def locate(path: Path) -> Path:
    """The file that :func:`load` reads: the path itself, or in a folder last.pt, without one previous.pt.

    Raises:
        CheckpointError: there is none.
    """
    for candidate in [path / LAST, path / PREVIOUS] if path.is_dir() else [path]:
        if candidate.exists():
            return candidate
    raise CheckpointError(f"there is no checkpoint {path}" + (f": no {LAST}, no {PREVIOUS}" if path.is_dir() else ""))


def load(path: Path) -> dict[str, Any]:
    """The state that :func:`save` wrote, its tensors on the CPU.

    Args:
        path: a checkpoint, or a folder with one (see :func:`locate`).

    Raises:
        CheckpointError: it is missing, truncated, damaged, not a checkpoint, or of another format version.
    """
    path = locate(path)
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"the checksum of {damaged} is wrong")
        content = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise ValueError(f"it contains a {type(content).__name__} of another format")
    except Exception as error:  # zipfile and torch.load raise many kinds for damaged files
        reason = str(error).partition("\n")[0] or type(error).__name__
        previous = path.with_name(PREVIOUS)
        hint = f"; try the one before it: --resume {previous}" if path.name == LAST and previous.exists() else ""
        raise CheckpointError(
            f"{path} is truncated, damaged or not a checkpoint of senet-fused train: {reason}{hint}"
        ) from None
    if content.get("version") != _VERSION:
        raise CheckpointError(
            f"{path} has checkpoint format version {content.get('version')!r}, and this release reads version "
            f"{_VERSION}; resume with the release that wrote it"
        )
    return content["state"]


def rng_state() -> dict[str, Any]:
    """The states of the global random generators: Python's, NumPy's, PyTorch's of the CPU and the current GPU."""
    _, key, pos, has_gauss, gauss = numpy.random.get_state()
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": {"key": key.tolist(), "pos": int(pos), "has_gauss": int(has_gauss), "gauss": float(gauss)},
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Restores what :func:`rng_state` returned."""
    random.setstate(state["python"])
    numpy.random.set_state(("MT19937", *state["numpy"].values()))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
