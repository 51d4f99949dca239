"""Checkpoints of a training run: a kill at any instant leaves a complete one, and a damaged one is never resumed from.

A folder holds two: last.pt, and previous.pt, the one before it. Each is a file of ``torch.save`` that
``torch.load(weights_only=True)`` reads, so opening one runs no code that came with it. It is a zip file, and the
CRC-32 of each of its members tells a damaged one.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ..arguments import RequestError
from .random_state import rng_state, set_rng_state

__all__ = [
    "LAST", "PREVIOUS", "CheckpointError", "check_model", "load", "locate", "rng_state", "save", "set_rng_state",
]  # fmt: skip

LAST, PREVIOUS = "last.pt", "previous.pt"
_FORMAT, _VERSION = "senet-fused training checkpoint", 1
_UNFINISHED, _ENDINGS = ".checkpoint-", (".new", ".old")  # names of files that are not in place yet
_PLAIN = (bool, int, float, str, type(None))
_ABSENT = object()


class CheckpointError(RequestError):
    """A checkpoint cannot be written, read or used; the message says why and what to do."""


# ---------------------------------------------------------------------------------- save


def save(folder: Path, state: Mapping[str, Any]) -> Path:
    """Writes a state to last.pt in a folder, made if need be; what was last.pt is then previous.pt.

    Killed at any instant, it leaves last.pt complete: as it was, or new. (Without hard links there is an instant
    with previous.pt only, which ``load`` then takes.) An error leaves both as they were.

    Args:
        folder: Where last.pt and previous.pt are.
        state: Tensors, dicts, lists, tuples, numbers, strings and None, nested as you like. Keys of dicts are
            strings or integers.

    Returns:
        The path of last.pt.

    Raises:
        TypeError: For a value that ``torch.load(weights_only=True)`` could not read back. The message has its place.
        CheckpointError: If the file cannot be written.
    """
    for name, value in state.items():
        _require_readable(value, name)
    content = {"format": _FORMAT, "version": _VERSION, "state": dict(state)}
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder) as (descriptor, alone):
            if alone:
                _remove_leftovers(folder)
            _write_and_rotate(folder, content)
            _sync_folder(descriptor)
    except OSError as error:
        raise CheckpointError(_why_not_saved(folder, content, error)) from error
    return folder / LAST


def _require_readable(value: Any, place: str) -> None:
    # Exact types: a numpy.float64 is a float, and torch.__version__ a str, that weights_only refuses.
    kind = type(value)
    if kind in (dict, OrderedDict):
        for key, inner in value.items():
            if type(key) not in (str, int):
                raise TypeError(f"{place} has a key {key!r} of type {_name(type(key))}; a key is a str or an int")
            _require_readable(inner, f"{place}.{key}")
    elif kind in (list, tuple):
        for index, inner in enumerate(value):
            _require_readable(inner, f"{place}.{index}")
    elif kind in (torch.Tensor, torch.nn.Parameter):
        if value.layout is not torch.strided or value.is_meta or value.is_quantized:
            raise TypeError(f"{place} is a {value.dtype} tensor on {value.device} with layout {value.layout}; "
                            "a checkpoint holds plain strided tensors with data")  # fmt: skip
    elif kind not in _PLAIN:
        raise TypeError(f"{place} is a {_name(kind)}; a checkpoint holds tensors, containers, numbers, str and None")


def _name(kind: type) -> str:
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"


@contextmanager
def _locked(folder: Path) -> Iterator[tuple[int, bool]]:
    """The folder's descriptor, and whether no other process is inside here for the same folder.

    The kernel gives the lock back when a process dies, however it dies, so unlike a process id in a file's name
    it cannot be mistaken on another host, in another container, or once the id has been given out again.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            alone = True
        except OSError:  # some network file systems lock no folders
            alone = False
        try:
            yield descriptor, alone
        finally:
            if alone:  # by hand: a process forked meanwhile would keep it
                fcntl.flock(descriptor, fcntl.LOCK_UN)
    finally:
        os.close(descriptor)


def _remove_leftovers(folder: Path) -> None:
    """What killed processes left behind: nobody who holds no lock is writing."""
    for path in folder.glob(f"{_UNFINISHED}*"):
        if path.suffix in _ENDINGS:
            path.unlink(missing_ok=True)


def _sync_folder(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot, and keep names by themselves
            raise


def _write_and_rotate(folder: Path, content: dict[str, Any]) -> None:
    stem = f"{_UNFINISHED}{secrets.token_hex(8)}"
    new, old = (folder / f"{stem}{ending}" for ending in _ENDINGS)
    last, previous = folder / LAST, folder / PREVIOUS
    try:
        _write(new, content)
        linked = _link(last, old)
        if not linked and last.exists():
            os.replace(last, previous)
        os.replace(new, last)
        # In this order a damaged last.pt never takes the place of a good previous.pt before the new one is there.
        if linked:
            os.replace(old, previous)
    finally:
        # Renaming one link of a file to another does nothing: old is left where last.pt and previous.pt were one.
        for path in (new, old):
            with suppress(OSError):
                path.unlink(missing_ok=True)


def _link(path: Path, to: Path) -> bool:
    """Gives a file a second name; False if there is no such file or the file system has no hard links."""
    try:
        os.link(path, to)
    except FileNotFoundError:
        return False
    except OSError as error:
        if error.errno in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV):
            return False
        raise
    return True


class _Output:
    """The file that torch.save writes to. It keeps the first error, of which torch's own says nothing."""

    def __init__(self, descriptor: int | None) -> None:
        self.descriptor = descriptor  # None: count only
        self.size = 0
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        if self.error is not None:
            raise self.error
        rest = memoryview(data).cast("B")
        size = len(rest)
        self.size += size
        try:
            while rest and self.descriptor is not None:
                rest = rest[os.write(self.descriptor, rest) :]
        except OSError as error:
            self.error = error
            raise
        return size

    def flush(self) -> None:
        """torch.save calls it; nothing is buffered here."""


def _write(path: Path, content: dict[str, Any]) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        output = _Output(descriptor)
        try:
            _serialize(content, output)
        except Exception as error:
            raise (output.error or error) from None
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _serialize(content: dict[str, Any], output: _Output) -> None:
    # A process can turn the checksums off; a file without them would be read as a damaged one.
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(True)
    try:
        torch.save(content, output)
    finally:
        torch.serialization.set_crc32_options(before)


def _why_not_saved(folder: Path, content: dict[str, Any], error: OSError) -> str:
    message = f"cannot save a checkpoint in {folder}: {error.strerror or error}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        counter = _Output(None)
        _serialize(content, counter)
        message += f"; {counter.size:,} bytes are needed"
        with suppress(OSError):
            message += f", {shutil.disk_usage(folder).free:,} are free there"
    kept = " and ".join(name for name in (LAST, PREVIOUS) if (folder / name).is_file())
    kept = f"; {kept} in it can be resumed from" if kept else ""
    return f"{message}{kept}. Make room or make it writable, or name another folder."


# ---------------------------------------------------------------------------------- load


def locate(path: Path) -> Path:
    """The file that ``load`` reads: the path itself, or in a folder last.pt, without one previous.pt.

    Raises:
        CheckpointError: If there is none.
    """
    path = Path(path)
    if path.is_dir():
        for name in (LAST, PREVIOUS):
            if (path / name).exists():
                return path / name
        raise CheckpointError(f"there is no checkpoint in {path}: neither {LAST} nor {PREVIOUS}")
    if not path.exists():
        raise CheckpointError(f"there is no checkpoint {path}{_other(path)}")
    return path


def load(path: Path) -> dict[str, Any]:
    """The state that ``save`` wrote, its tensors on the CPU.

    Args:
        path: A checkpoint, or a folder with one (see ``locate``).

    Raises:
        CheckpointError: If it is missing, truncated, damaged, no checkpoint, or of another version. The message
            says which, and names previous.pt if that can be used.
    """
    path = locate(path)
    try:
        return _read(path)
    except CheckpointError as error:
        raise CheckpointError(f"{error}{_other(path)}") from None


def _read(path: Path) -> dict[str, Any]:
    _require_intact(path)
    foreign = f"{path} is no checkpoint of senet-fused train"
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from None
    except Exception as error:  # the checksums are right, so most likely it is what was written that is wrong
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise CheckpointError(f"{foreign}, or damaged: {reason}") from None
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise CheckpointError(f"{foreign}; PyTorch finds a {_name(type(content))} of another kind")
    if content.get("version") != _VERSION:
        raise CheckpointError(
            f"{path} is a checkpoint of format version {content.get('version')!r}, and this release reads "
            f"version {_VERSION}; resume with the release that wrote it"
        )
    return content["state"]


def _require_intact(path: Path) -> None:
    try:
        with path.open("rb") as file:
            fault = _fault(file)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from None
    if fault is not None:
        raise CheckpointError(f"{path} {fault}")


def _fault(file: BinaryIO) -> str | None:
    start = file.read(4)
    if not start:
        return "is empty"
    if start != b"PK\x03\x04":
        return "is no checkpoint: it does not begin as a file of torch.save does"
    try:
        if not zipfile.is_zipfile(file):
            return f"is truncated, or damaged at its end: it stops after {os.fstat(file.fileno()).st_size:,} bytes"
        with zipfile.ZipFile(file) as archive:
            member = archive.testzip()
    except Exception as error:  # zipfile raises half a dozen kinds for a damaged directory
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # which is a seek to nowhere
            raise
        return f"is damaged: {str(error) or type(error).__name__}"
    return None if member is None else f"is damaged: the checksum of {member} is wrong"


def _other(path: Path) -> str:
    """The end of a message about a checkpoint that cannot be used: the one beside it, if that can."""
    previous = path.with_name(PREVIOUS)
    if path.name == PREVIOUS or not previous.is_file():
        return ""
    try:
        _read(previous)
    except CheckpointError:
        return f"; {previous} cannot be used either"
    return f"; the one before it is complete: --resume {previous}"


# ---------------------------------------------------------------------------------- of which model


def check_model(state: Mapping[str, Any], description: Mapping[str, Any]) -> None:
    """Raises CheckpointError unless the checkpoint's ``description`` is this one; names each entry that differs."""
    saved = state.get("description")
    if not isinstance(saved, Mapping):
        raise CheckpointError("the checkpoint does not say of which model it is")
    different = [
        f"{name} is {_shown(saved, name)} in the checkpoint and {_shown(description, name)} here"
        for name in dict.fromkeys([*saved, *description])
        if saved.get(name, _ABSENT) != description.get(name, _ABSENT)
    ]
    if different:
        raise CheckpointError(f"the checkpoint is of another model: {'; '.join(different)}")


def _shown(mapping: Mapping[str, Any], name: str) -> str:
    return repr(mapping[name]) if name in mapping else "absent"
