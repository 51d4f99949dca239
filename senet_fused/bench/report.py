"""Rows of SE layers and block tails as tables and a summary."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TextIO

from .problems import OPS, TAIL_DIRECTIONS
from .saved import Row, geometric_mean, grouped
from .tables import Table, error_label, rate_label, ratio_label, share_label, show, show_header, time_label

__all__ = ["group_of", "op_of", "render", "shape_label", "size_label", "summarise", "task_label", "tensor_bytes"]

_ELEMENT_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


def op_of(row: Row) -> str:
    """What was measured, one of OPS; rows of the SE layer do not name it."""
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


def summarise(rows: Sequence[Row]) -> list[Row]:
    """One entry per (op, problem, dtype, direction, cache, provider), over shapes and layouts.

    speedup_vs_eager and copies are geometric means; slowest is the smallest speedup with the cell it belongs to; behind
    counts the cells slower than eager; measured of cells have a time. Several problems have entries of their own and
    common ones (problem "all").
    """
    problems, dtypes = ([*dict.fromkeys(row[key] for row in rows)] for key in ("problem", "dtype"))
    if len(problems) > 1:
        rows = [*rows, *(row | {"problem": "all"} for row in rows)]
        problems.append("all")
    keys = ("problem", "dtype", "direction", "cache", "provider")
    groups = grouped(rows, lambda row: (op_of(row), *(row[key] for key in keys)))

    def rank(group: tuple[str, ...]) -> tuple[int, ...]:
        orders = (OPS, problems, dtypes, TAIL_DIRECTIONS)
        return tuple(order.index(name) for order, name in zip(orders, group, strict=False))

    summary = []
    for op, *group in sorted(groups, key=rank):
        members = groups[(op, *group)]
        compared = [row for row in members if row["speedup_vs_eager"]]
        slowest = min(compared, key=lambda row: row["speedup_vs_eager"], default=None)
        entry: Row = {} if op == "se" else {"op": op}
        entry |= dict(zip(keys, group, strict=True)) | {
            "speedup_vs_eager": geometric_mean(row["speedup_vs_eager"] for row in members),
            "copies": geometric_mean(row["copies"] for row in members),
            "slowest": slowest and slowest["speedup_vs_eager"],
            "slowest_at": slowest and f"{shape_label(slowest)} {slowest['layout']}",
            "behind": sum(row["speedup_vs_eager"] < 1 for row in compared),
            "measured": sum(row["median_s"] is not None for row in members),
            "cells": len(members),
        }
        if any("wall_median_s" in row for row in members):
            entry["wall_speedup_vs_eager"] = geometric_mean(row.get("wall_speedup_vs_eager") for row in members)
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
        "GB/s": rate_label(row["gbps"]),
        "of copy": share_label(row["fraction_of_copy"]),
        "max error": error_label(row["max_error"]),
    }


def _result_tables(rows: Sequence[Row]) -> list[Table]:
    layouts = list(dict.fromkeys(row["layout"] for row in rows))
    tables = []
    for (problem, *task), members in grouped(rows, group_of).items():
        lines = [_result_cells(row) for row in sorted(members, key=lambda row: layouts.index(row["layout"]))]
        last = None
        for cells in lines:
            where = cells["N x C/R @ plane"], cells["layout"]
            if where == last:
                cells |= {"N x C/R @ plane": "", "layout": ""}
            last = where
        tables.append(Table(f"{problem}: {', '.join(task)}", lines))
    return tables


def _summary_table(summary: Sequence[Row]) -> Table:
    lines = []
    for entry in summary:
        gpu = "wall_speedup_vs_eager" in entry
        compared = entry["provider"] not in ("eager", "copy") and entry["slowest"] is not None
        lines.append(
            {
                "problem": entry["problem"],
                "dtype": entry["dtype"],
                "direction": task_label(entry),
                **({"cache": entry["cache"]} if gpu else {}),
                "provider": entry["provider"],
                "vs eager": ratio_label(entry["speedup_vs_eager"]),
                **({"wall vs eager": ratio_label(entry["wall_speedup_vs_eager"])} if gpu else {}),
                "copies": ratio_label(entry["copies"]),
                "slowest cell": f"{entry['slowest']:.2f} at {entry['slowest_at']}" if compared else "",
                "behind": str(entry["behind"]) if compared else "",
                "cells": f"{entry['measured']}/{entry['cells']}",
            }
        )
    return Table("Geometric means over shapes and layouts", lines)


def render(header: Row, rows: Sequence[Row], summary: Sequence[Row], out: TextIO, plain: bool = False) -> None:
    """Prints what was measured and how, the tables, and the summary."""
    show_header(header, out)
    show([*_result_tables(rows), _summary_table(summary)] if rows else [], out, plain)
