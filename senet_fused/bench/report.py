"""Rows as a terminal table, a summary and JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TextIO

from .problems import DIRECTIONS, GPU_BACKENDS, RequestError

__all__ = [
    "geometric_mean", "read_json", "render", "shape_label", "size_label", "summarise", "tensor_bytes", "write_json",
]  # fmt: skip

Row = dict[str, Any]
_HEADER = ("device", "versions", "threads", "revision", "warning", "cache", "byte_model", "copy", "baseline",
           "interrupted")  # fmt: skip
# What a row has to have for tables and pictures.
_NEEDED = (
    "problem", "shape", "dtype", "layout", "direction", "cache", "provider", "backend", "form", "median_s", "iqr_s",
    "speedup_vs_eager", "copies", "passes", "gbps", "fraction_of_copy", "max_error", "error",
)  # fmt: skip
_ELEMENT_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


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
    """One entry per (problem, dtype, direction, cache, provider), over shapes and layouts.

    speedup_vs_eager and copies are geometric means; slowest is the smallest speedup with the cell it belongs
    to; behind counts the cells slower than eager; measured of cells have a time. With several problems there
    is one more entry per group for all of them together (problem "all").
    """
    problems = list(dict.fromkeys(row["problem"] for row in rows))
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        for problem in [row["problem"]] if len(problems) == 1 else [row["problem"], "all"]:
            key = (problem, row["dtype"], row["direction"], row["cache"], row["provider"])
            groups.setdefault(key, []).append(row)

    def rank(key: tuple[str, ...]) -> tuple[int, ...]:
        return ([*problems, "all"].index(key[0]), dtypes.index(key[1]), DIRECTIONS.index(key[2]))

    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    summary = []
    for key in sorted(groups, key=rank):
        members = groups[key]
        compared = [row for row in members if row["speedup_vs_eager"]]
        slowest = min(compared, key=lambda row: row["speedup_vs_eager"], default=None)
        walls = [row["wall_speedup_vs_eager"] for row in members if row.get("wall_speedup_vs_eager")]
        entry: Row = dict(zip(("problem", "dtype", "direction", "cache", "provider"), key, strict=True))
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


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if seconds * scale >= 1 or unit == "us":
            return (
                f"{seconds * scale:.3g} {unit}" if seconds * scale < 1000 else f"{seconds * scale:.0f} {unit}"
            )
    raise AssertionError


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}" if value < 100 else f"{value:.0f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}" if value >= 0.095 else f"{value:.1%}"


_TEXT_COLUMNS = {"N x C/R @ plane", "layout", "cache", "provider", "ran on", "problem", "dtype", "direction",
                 "slowest cell"}  # fmt: skip
# What a narrow terminal can do without, first to go first.
_DISPENSABLE = ("GB/s", "IQR", "ran on", "behind", "max error", "of copy")


@dataclasses.dataclass
class _Table:
    """Rows of cells by column head; a row with an "error" has only its first cells, and the text."""

    title: str
    rows: list[dict[str, str]]

    @property
    def heads(self) -> list[str]:
        return list(dict.fromkeys(head for row in self.rows for head in row if head != "error"))

    def width(self, head: str) -> int:
        return max(len(head), *(len(row.get(head, "")) for row in self.rows))


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
        "device" if gpu else "median": _time(row["median_s"]),
        "IQR": _time(row["iqr_s"]),
        "vs eager": _ratio(row["speedup_vs_eager"]),
    }
    if gpu:
        cells |= {"wall": _time(row["wall_median_s"]), "wall vs eager": _ratio(row["wall_speedup_vs_eager"])}
    return cells | {
        "copies": _ratio(row["copies"]),
        "GB/s": f"{row['gbps']:.3g}",
        "of copy": _share(row["fraction_of_copy"]),
        "max error": f"{row['max_error']:.1e}",
    }


def _result_tables(rows: Sequence[Row]) -> list[_Table]:
    tables = []
    layouts = list(dict.fromkeys(row["layout"] for row in rows))
    for group in dict.fromkeys((row["problem"], row["direction"], row["dtype"]) for row in rows):
        members = [row for row in rows if (row["problem"], row["direction"], row["dtype"]) == group]
        members.sort(key=lambda row: layouts.index(row["layout"]))
        lines, last = [], None
        for row in members:
            cells = _result_cells(row)
            where = [cells[head] for head in ("N x C/R @ plane", "layout")]
            if where == last:
                cells |= {"N x C/R @ plane": "", "layout": ""}
            last = where
            lines.append(cells)
        tables.append(_Table(f"{group[0]}: {', '.join(group[1:])}", lines))
    return tables


def _summary_table(summary: Sequence[Row]) -> _Table:
    lines = []
    for entry in summary:
        gpu = "wall_speedup_vs_eager" in entry
        rival = entry["provider"] not in ("eager", "copy") and entry["slowest"] is not None
        cells = {head: entry[head] for head in ("problem", "dtype", "direction")}
        if gpu:
            cells["cache"] = entry["cache"]
        cells |= {"provider": entry["provider"], "vs eager": _ratio(entry["speedup_vs_eager"])}
        if gpu:
            cells["wall vs eager"] = _ratio(entry["wall_speedup_vs_eager"])
        cells |= {
            "copies": _ratio(entry["copies"]),
            "slowest cell": f"{entry['slowest']:.2f} at {entry['slowest_at']}" if rival else "",
            "behind": str(entry["behind"]) if rival else "",
            "cells": f"{entry['measured']}/{entry['cells']}",
        }
        lines.append(cells)
    return _Table("Geometric means over shapes and layouts", lines)


def _roofline_tables(rows: Sequence[Row]) -> list[_Table]:
    """GB/s of every provider and their part of the copy's; one table per problem, direction, dtype and cache."""
    names = list(dict.fromkeys(row["provider"] for row in rows if row["provider"] != "copy"))
    caches = list(dict.fromkeys(row["cache"] for row in rows))
    tables = []
    for group in dict.fromkeys((row["problem"], row["direction"], row["dtype"]) for row in rows):
        for cache in caches:
            members = [row for row in rows if (row["problem"], row["direction"], row["dtype"]) == group]
            members = [row for row in members if row["cache"] == cache]
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
                    missing = "error" if row["error"] else "-"
                    cells[name] = (
                        missing if row["gbps"] is None else f"{row['gbps']:.3g} ({_share(row['fraction_of_copy'])})"
                    )
                lines.append(cells)
            if lines:
                layouts = list(dict.fromkeys(line["layout"] for line in lines))
                lines.sort(key=lambda line, layouts=layouts: layouts.index(line["layout"]))
                tables.append(_Table(f"GB/s (of copy), {cache}, {group[0]}: {', '.join(group[1:])}", lines))
    return tables


def _plain(table: _Table, out: TextIO) -> None:
    heads = table.heads
    widths = {head: table.width(head) for head in heads}

    def line(cells: dict[str, str]) -> str:
        padded = [
            text.ljust(widths[head]) if head in _TEXT_COLUMNS else text.rjust(widths[head])
            for head, text in cells.items()
        ]
        return "  ".join(padded).rstrip()

    top = line({head: head for head in heads})
    print(f"\n{table.title}\n{top}\n{'-' * len(top)}", file=out)
    for row in table.rows:
        shown = line({head: text for head, text in row.items() if head != "error"})
        print(f"{shown}  ERROR {row['error']}" if "error" in row else shown, file=out)


def _rich(tables: Sequence[_Table], out: TextIO) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(file=out, highlight=False)
    for table in tables:
        heads, left_out = table.heads, []
        for head in _DISPENSABLE:
            if head in heads and sum(table.width(h) + 3 for h in heads) > console.width:
                heads.remove(head)
                left_out.append(head)
        grid = Table(title=table.title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD,
                     pad_edge=False, padding=(0, 1))  # fmt: skip
        for head in heads:
            grid.add_column(
                head, justify="left" if head in _TEXT_COLUMNS else "right", no_wrap=head != "slowest cell"
            )
        errors = []
        for row in table.rows:
            style = {"copy": "dim"}.get(row.get("provider", ""), "")
            if row.get("provider") in ("fused", *GPU_BACKENDS):
                style = "bold"
            if "error" in row:
                errors.append(row["error"])
                style = "red"
                missing = next(head for head in heads if head not in row)
                row = row | {missing: f"ERROR [{len(errors)}]"}
            grid.add_row(*(Text(row.get(head, ""), style=style) for head in heads))
        console.print()
        console.print(grid)
        for number, error in enumerate(errors, 1):
            console.print(Text(f"[{number}] {error}", style="red"))
        if left_out:
            console.print(Text(f"no room for: {', '.join(left_out)} (the JSON has them)", style="dim"))


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
    for name in _HEADER:
        value = header.get(name)
        if isinstance(value, dict):
            value = ", ".join(f"{key} {text}" for key, text in value.items() if text is not None)
        if value is not None:
            print(f"{name.replace('_', ' ') + ':':12} {value}", file=out)
    tables = []
    if rows:
        tables = [*_result_tables(rows), *(_roofline_tables(rows) if roofline else ()), _summary_table(summary)]
    if out.isatty() and not plain:
        try:
            _rich(tables, out)
            return
        except ImportError:
            pass
    for table in tables:
        _plain(table, out)


def write_json(path: Path, header: Row, rows: Sequence[Row], summary: Sequence[Row]) -> None:
    """Writes {"header", "rows", "summary"}; what was not measured is null."""
    text = json.dumps({"header": header, "rows": rows, "summary": summary}, indent=1, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def read_json(paths: Sequence[Path]) -> tuple[Row, list[Row]]:
    """Header and rows of what :func:`write_json` has written, of several files together.

    Raises:
        RequestError: a file cannot be read or is no such file, or the files are of different devices, threads or
            versions; the message says which.
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
            missing |= {key for row in more for key in _NEEDED if key not in row}
        except (KeyError, TypeError):
            missing = {"header or rows"}
        if missing:
            raise RequestError(f"{path} was not written by `senet-fused bench --json`: no {', '.join(sorted(missing))}")
        headers.append(found)
        for key in ("device", "versions", "threads"):
            if found[key] != headers[0][key]:
                raise RequestError(f"{path} and {paths[0]} differ in {key}: {found[key]} and {headers[0][key]}")
        rows += more
    several = {}
    for key in ("command", "revision", "warning", "interrupted"):
        several[key] = "; ".join(dict.fromkeys(found[key] for found in headers if found.get(key))) or None
    return headers[0] | several, rows
