"""Saved runs: what `--json` writes and `--from` and `compare` read; the two kinds of runs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from ..arguments import RequestError

__all__ = ["KINDS", "Kind", "Row", "geometric_mean", "grouped", "kind_of", "read_json", "write_json"]

Row = dict[str, Any]
Key = TypeVar("Key", bound=Hashable)


class Kind(NamedTuple):
    """What a command measures.

    identity: columns of a row that say what was measured; op may be missing (the SE layer). figures: further columns
    that a report reads and every release has written.
    """

    command: str
    identity: tuple[str, ...]
    figures: tuple[str, ...]


# By the name in a header; runs of layers have none.
KINDS = {
    "layers": Kind(
        "`senet-fused bench`",
        ("op", "problem", "shape", "dtype", "layout", "direction", "cache", "provider"),
        (
            "backend", "form", "median_s", "iqr_s", "speedup_vs_eager", "copies", "passes", "gbps", "fraction_of_copy",
            "max_error", "error",
        ),
    ),
    "model": Kind(
        "`senet-fused bench model`",
        ("model", "batch", "size", "dtype", "amp", "layout", "mode", "provider"),
        (
            "backend", "median_s", "iqr_s", "speedup_vs_stock", "price_of_se", "output_error", "gradient_error", "note",
            "error",
        ),
    ),
}  # fmt: skip


def kind_of(header: Row) -> str:
    """What the rows below a header are about: "layers" or "model"."""
    return header.get("kind", "layers")


def geometric_mean(values: Iterable[float | None]) -> float | None:
    """The geometric mean of positive values, without those that are None; None for no values."""
    logs = [math.log(value) for value in values if value is not None]
    return math.exp(sum(logs) / len(logs)) if logs else None


def grouped(rows: Iterable[Row], key: Callable[[Row], Key]) -> dict[Key, list[Row]]:
    """Rows by their key, in the order of the keys' first rows."""
    groups: dict[Key, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def write_json(path: Path, header: Row, rows: Sequence[Row], summary: Sequence[Row]) -> None:
    """Writes {"header", "rows", "summary"}; what was not measured is null.

    The file is replaced at once: a reader, or a process that is killed, leaves the old content or all of the new one.
    """
    text = json.dumps({"header": header, "rows": rows, "summary": summary}, indent=1, allow_nan=False) + "\n"
    if path.exists() and not path.is_file():  # a pipe, say
        path.write_text(text, encoding="utf-8")
        return
    half = path.with_name(f"{path.name}.part")
    half.write_text(text, encoding="utf-8")
    half.replace(path)


def read_json(paths: Sequence[Path]) -> tuple[Row, list[Row]]:
    """Header and rows of what :func:`write_json` has written, of several files together.

    Raises:
        RequestError: a file cannot be read or is no such file, or the files are of different kinds, devices, threads
            or versions; the message says which.
    """
    headers, rows = [], []
    for path in paths:
        header, more = _read(path)
        headers.append(header)
        rows += more
        kinds = [KINDS[kind_of(one)].command for one in (header, headers[0])]
        if kinds[0] != kinds[1]:
            raise RequestError(f"{path} is a run of {kinds[0]} and {paths[0]} one of {kinds[1]}; report each by itself")
        for key in ("device", "versions", "threads"):
            if header[key] != headers[0][key]:
                raise RequestError(f"{path} and {paths[0]} differ in {key}: {header[key]} and {headers[0][key]}")
    several = {}
    for key in ("command", "revision", "warning", "interrupted"):
        several[key] = "; ".join(dict.fromkeys(one[key] for one in headers if one.get(key))) or None
    return headers[0] | several, rows


def _read(path: Path) -> tuple[Row, list[Row]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RequestError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    try:
        header, rows = content["header"], list(content["rows"])
        missing = {"device", "versions", "threads", "date"} - set(header)
        kind = KINDS[kind_of(header)]
        missing |= {key for row in rows for key in (*kind.identity, *kind.figures) if key not in row} - {"op"}
    except (KeyError, TypeError, AttributeError):
        missing = {"header or rows"}
    if missing:
        raise RequestError(f"{path} was not written by `senet-fused bench --json`: no {', '.join(sorted(missing))}")
    return header, rows
