"""Rows as a terminal table, a summary and JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TextIO

from ..arguments import RequestError
from .problems import OPS, TAIL_DIRECTIONS
from .tables import Table, ratio_label, share_label, show, show_header, time_label

__all__ = [
    "COMMANDS", "geometric_mean", "group_of", "kind_of", "op_of", "read_json", "render", "shape_label", "size_label",
    "summarise", "task_label", "tensor_bytes", "write_json",
]  # fmt: skip

Row = dict[str, Any]
_HEADER = ("device", "versions", "threads", "revision", "warning", "cache", "byte_model", "copy", "baseline",
           "backward", "interrupted")  # fmt: skip
# What a row has to have for tables and pictures, by the kind of run that the header names; without a name it is layers.
_NEEDED = {
    "layers": (
        "problem", "shape", "dtype", "layout", "direction", "cache", "provider", "backend", "form", "median_s", "iqr_s",
        "speedup_vs_eager", "copies", "passes", "gbps", "fraction_of_copy", "max_error", "error",
    ),
    "model": (
        "model", "batch", "size", "dtype", "amp", "layout", "mode", "provider", "backend", "median_s", "iqr_s",
        "speedup_vs_stock", "price_of_se", "output_error", "gradient_error", "se_layers", "se_fused", "note", "error",
    ),
}  # fmt: skip
# Who measures which kind.
COMMANDS = {"layers": "`senet-fused bench`", "model": "`senet-fused bench model`"}
_ELEMENT_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


def op_of(row: Row) -> str:
    """What was measured, one of OPS; a row that does not say so is of the SE layer."""
    return row.get("op", "se")


def task_label(row: Row) -> str:
    """The direction, with the op in front if it is not the SE layer: ``tail forward``."""
    return row["direction"] if op_of(row) == "se" else f"{op_of(row)} {row['direction']}"


def group_of(row: Row) -> tuple[str, str, str]:
    """What the rows of one table and of one panel have in common."""
    return row["problem"], task_label(row), row["dtype"]


def shape_label(row: Row) -> str:
    """``8 x 256/16 @ 56x56``: N x C/R @ spatial."""
    n, c, r, *spatial = row["shape"].split(",")
    return f"{n} x {c}/{r} @ {'x'.join(spatial)}"


def tensor_bytes(row: Row) -> int:
    """The size of x."""
    n, c, _, *spatial = map(int, row["shape"].split(","))
    return math.prod((n, c, *spatial)) * _ELEMENT_BYTES[row["dtype"]]


def size_label(size: float) -> str:
    """Bytes, readable: ``25.7 MB``."""
    unit, scale = ("kB", 1e3) if size < 1e6 else ("MB", 1e6) if size < 1e9 else ("GB", 1e9)
    return f"{size / scale:.3g} {unit}"


def geometric_mean(values: Iterable[float]) -> float | None:
    """The geometric mean of positive values; None for no values."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else None


def summarise(rows: Sequence[Row]) -> list[Row]:
    """One entry per (op, problem, dtype, direction, cache, provider), over shapes and layouts.

    speedup_vs_eager and copies are geometric means; slowest is the smallest speedup with the cell it belongs
    to; behind counts the cells slower than eager; measured of cells have a time. With several problems there
    is one more entry per group for all of them together (problem "all").
    """
    problems = list(dict.fromkeys(row["problem"] for row in rows))
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        for problem in [row["problem"]] if len(problems) == 1 else [row["problem"], "all"]:
            key = (op_of(row), problem, row["dtype"], row["direction"], row["cache"], row["provider"])
            groups.setdefault(key, []).append(row)

    def rank(key: tuple[str, ...]) -> tuple[int, ...]:
        op, problem, dtype, direction, *_ = key
        return (
            OPS.index(op), [*problems, "all"].index(problem), dtypes.index(dtype), TAIL_DIRECTIONS.index(direction),
        )  # fmt: skip

    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    summary = []
    for key in sorted(groups, key=rank):
        members = groups[key]
        compared = [row for row in members if row["speedup_vs_eager"]]
        slowest = min(compared, key=lambda row: row["speedup_vs_eager"], default=None)
        walls = [row["wall_speedup_vs_eager"] for row in members if row.get("wall_speedup_vs_eager")]
        entry: Row = dict(zip(("op", "problem", "dtype", "direction", "cache", "provider"), key, strict=True))
        if entry["op"] == "se":
            del entry["op"]
        entry |= {
            "speedup_vs_eager": geometric_mean(row["speedup_vs_eager"] for row in compared),
            "copies": geometric_mean(row["copies"] for row in members if row["copies"]),
            "slowest": slowest and slowest["speedup_vs_eager"],
            "slowest_at": slowest and f"{shape_label(slowest)} {slowest['layout']}",
            "behind": sum(row["speedup_vs_eager"] < 1 for row in compared),
            "measured": sum(row["median_s"] is not None for row in members),
            "cells": len(members),
        }
        if any("wall_median_s" in row for row in members):
            entry["wall_speedup_vs_eager"] = geometric_mean(walls)
        summary.append(entry)
    return summary


def _result_cells(row: Row) -> dict[str, str]:
    gpu = "wall_median_s" in row
    cells = {"N x C/R @ plane": shape_label(row), "layout": row["layout"]}
    if gpu:
        cells["cache"] = row["cache"]
    cells["provider"] = row["provider"]
    if row["error"]:
        return cells | {"error": row["error"]}
    cells |= {
        "ran on": row["backend"] + (f" ({row['form']})" if row["form"] else ""),
        "device" if gpu else "median": time_label(row["median_s"]),
        "IQR": time_label(row["iqr_s"]),
        "vs eager": ratio_label(row["speedup_vs_eager"]),
    }
    if gpu:
        cells |= {"wall": time_label(row["wall_median_s"]), "wall vs eager": ratio_label(row["wall_speedup_vs_eager"])}
    return cells | {
        "copies": ratio_label(row["copies"]),
        "GB/s": f"{row['gbps']:.3g}",
        "of copy": share_label(row["fraction_of_copy"]),
        "max error": f"{row['max_error']:.1e}",
    }


def _result_tables(rows: Sequence[Row]) -> list[Table]:
    tables = []
    layouts = list(dict.fromkeys(row["layout"] for row in rows))
    for group in dict.fromkeys(map(group_of, rows)):
        members = [row for row in rows if group_of(row) == group]
        members.sort(key=lambda row: layouts.index(row["layout"]))
        lines, last = [], None
        for row in members:
            cells = _result_cells(row)
            where = [cells[head] for head in ("N x C/R @ plane", "layout")]
            if where == last:
                cells |= {"N x C/R @ plane": "", "layout": ""}
            last = where
            lines.append(cells)
        tables.append(Table(f"{group[0]}: {', '.join(group[1:])}", lines))
    return tables


def _summary_table(summary: Sequence[Row]) -> Table:
    lines = []
    for entry in summary:
        gpu = "wall_speedup_vs_eager" in entry
        rival = entry["provider"] not in ("eager", "copy") and entry["slowest"] is not None
        cells = {"problem": entry["problem"], "dtype": entry["dtype"], "direction": task_label(entry)}
        if gpu:
            cells["cache"] = entry["cache"]
        cells |= {"provider": entry["provider"], "vs eager": ratio_label(entry["speedup_vs_eager"])}
        if gpu:
            cells["wall vs eager"] = ratio_label(entry["wall_speedup_vs_eager"])
        cells |= {
            "copies": ratio_label(entry["copies"]),
            "slowest cell": f"{entry['slowest']:.2f} at {entry['slowest_at']}" if rival else "",
            "behind": str(entry["behind"]) if rival else "",
            "cells": f"{entry['measured']}/{entry['cells']}",
        }
        lines.append(cells)
    return Table("Geometric means over shapes and layouts", lines)


def _roofline_tables(rows: Sequence[Row]) -> list[Table]:
    """GB/s of every provider and their part of the copy's; one table per problem, direction, dtype and cache."""
    names = list(dict.fromkeys(row["provider"] for row in rows if row["provider"] != "copy"))
    caches = list(dict.fromkeys(row["cache"] for row in rows))
    tables = []
    for group in dict.fromkeys(map(group_of, rows)):
        for cache in caches:
            members = [row for row in rows if group_of(row) == group and row["cache"] == cache]
            lines = []
            for shape, layout in dict.fromkeys((row["shape"], row["layout"]) for row in members):
                found = {row["provider"]: row for row in members if (row["shape"], row["layout"]) == (shape, layout)}
                first = next(iter(found.values()))
                copy = found.get("copy", {}).get("gbps")
                cells = {
                    "N x C/R @ plane": shape_label(first),
                    "layout": layout,
                    "tensor": size_label(tensor_bytes(first)),
                    "copy": "-" if copy is None else f"{copy:.3g}",
                }
                for name in names:
                    row = found.get(name, {"gbps": None, "error": None})
                    cells[name] = "error" if row["error"] else "-"
                    if row["gbps"] is not None:
                        cells[name] = f"{row['gbps']:.3g} ({share_label(row['fraction_of_copy'])})"
                lines.append(cells)
            if lines:
                layouts = list(dict.fromkeys(line["layout"] for line in lines))
                lines.sort(key=lambda line, layouts=layouts: layouts.index(line["layout"]))
                tables.append(Table(f"GB/s (of copy), {cache}, {group[0]}: {', '.join(group[1:])}", lines))
    return tables


def render(
    header: Row,
    rows: Sequence[Row],
    summary: Sequence[Row],
    out: TextIO,
    plain: bool = False,
    roofline: bool = False,
) -> None:
    """Prints what was measured and how, the tables, with roofline those of the bandwidths, and the summary.

    On a terminal they are rich's, if rich is installed and not plain.
    """
    show_header(header, _HEADER, out)
    tables = []
    if rows:
        tables = [*_result_tables(rows), *(_roofline_tables(rows) if roofline else ()), _summary_table(summary)]
    show(tables, out, plain)


def write_json(path: Path, header: Row, rows: Sequence[Row], summary: Sequence[Row]) -> None:
    """Writes {"header", "rows", "summary"}; what was not measured is null. Who reads the file meanwhile, or after the
    process was killed, has what it was before or all of this."""
    text = json.dumps({"header": header, "rows": rows, "summary": summary}, indent=1, allow_nan=False) + "\n"
    if path.exists() and not path.is_file():  # a pipe, say
        path.write_text(text, encoding="utf-8")
        return
    half = path.with_name(f"{path.name}.part")
    half.write_text(text, encoding="utf-8")
    half.replace(path)


def kind_of(header: Row) -> str:
    """What the rows below a header are about: "layers" or "model"."""
    return header.get("kind", "layers")


def read_json(paths: Sequence[Path]) -> tuple[Row, list[Row]]:
    """Header and rows of what :func:`write_json` has written, of several files together.

    Raises:
        RequestError: a file cannot be read or is no such file, or the files are of different kinds, devices, threads
            or versions; the message says which.
    """
    headers: list[Row] = []
    rows: list[Row] = []
    for path in paths:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RequestError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
        try:
            found, more = content["header"], list(content["rows"])
            missing = {key for key in ("device", "versions", "threads", "date") if key not in found}
            missing |= {key for row in more for key in _NEEDED[kind_of(found)] if key not in row}
        except (KeyError, TypeError, AttributeError):
            missing = {"header or rows"}
        if missing:
            raise RequestError(f"{path} was not written by `senet-fused bench --json`: no {', '.join(sorted(missing))}")
        headers.append(found)
        if kind_of(found) != kind_of(headers[0]):
            raise RequestError(
                f"{path} is a run of {COMMANDS[kind_of(found)]} and {paths[0]} one of {COMMANDS[kind_of(headers[0])]}; "
                "report each by itself"
            )
        for key in ("device", "versions", "threads"):
            if found[key] != headers[0][key]:
                raise RequestError(f"{path} and {paths[0]} differ in {key}: {found[key]} and {headers[0][key]}")
        rows += more
    several = {}
    for key in ("command", "revision", "warning", "interrupted", "byte_model", "baseline", "backward"):
        several[key] = "; ".join(dict.fromkeys(found[key] for found in headers if found.get(key))) or None
    return headers[0] | several, rows
