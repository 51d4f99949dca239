"""Rows of whole networks as tables and a summary."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TextIO

from .report import geometric_mean
from .tables import Table, error_label, megabytes_label, rate_label, ratio_label, show, show_header, time_label

__all__ = ["dtype_label", "input_label", "render", "summarise"]

Row = dict[str, Any]
_HEADER = ("device", "versions", "threads", "revision", "warning", "weights", "inference", "training", "price of SE",
           "largest batch", "memory", "check", "interrupted")  # fmt: skip


def input_label(row: Row) -> str:
    """``8 x 3x224x224``: the batch size and the shape of one input."""
    return f"{row['batch']} x {row['size'].replace(',', 'x')}"


def dtype_label(row: Row) -> str:
    return f"{row['dtype']} by autocast" if row["amp"] else row["dtype"]


def summarise(rows: Sequence[Row]) -> list[Row]:
    """One entry per (mode, dtype, amp, provider), over models, batches and layouts: geometric means.

    measured of cells have a time.
    """
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in ("mode", "dtype", "amp", "provider")), []).append(row)
    summary = []
    for key, members in groups.items():
        entry: Row = dict(zip(("mode", "dtype", "amp", "provider"), key, strict=True))
        for value in ("speedup_vs_stock", "price_of_se"):
            entry[value] = geometric_mean(row[value] for row in members if row[value] is not None)
        entry["measured"] = sum(row["median_s"] is not None for row in members)
        summary.append(entry | {"cells": len(members)})
    return summary


def _tables(rows: Sequence[Row]) -> list[Table]:
    """One per model, mode, dtype, batch and layout."""
    tables: dict[str, Table] = {}
    for row in rows:
        what = (row["mode"], dtype_label(row), input_label(row), row["layout"])
        table = tables.setdefault(title := f"{row['model']}: {', '.join(what)}", Table(title, [], []))
        cells = {"variant": row["provider"]}
        if row["note"]:
            table.notes.append(f"{row['provider']}: {row['note']}")
        if row["error"]:
            table.rows.append(cells | {"error": row["error"]})
            continue
        table.rows.append(
            cells
            | {
                "ran on": row["backend"] or "-",
                "median": time_label(row["median_s"]),
                "IQR": time_label(row["iqr_s"]),
                "images/s": rate_label(row["batch"] / row["median_s"] if row["median_s"] else None),
                "vs stock": ratio_label(row["speedup_vs_stock"]),
                "price of SE": ratio_label(row["price_of_se"]),
                **(_memory_cells(row) if row["mode"] == "training" else {}),
                "output": error_label(row["output_error"]),
            }
            | ({"gradients": error_label(row["gradient_error"])} if row["mode"] == "training" else {})
        )
    return list(tables.values())


def _memory_cells(row: Row) -> dict[str, str]:
    # A run that was saved earlier may have none.
    change = ("saved", "peak") if row["provider"] != "stock" else ()
    return {
        f"{what} MB": megabytes_label(row.get(f"{what}_bytes"), row.get(f"{what}_vs_stock") if what in change else None)
        for what in ("saved", "peak")
    }


def _sweeps(rows: Sequence[Row]) -> list[Table]:
    """Images/s and the price of SE by batch and variant, for what was measured at more than one batch."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row["median_s"]:
            what = (row["mode"], dtype_label(row), row["size"].replace(",", "x"), row["layout"])
            groups.setdefault(f"{row['model']}: {', '.join(what)}", []).append(row)
    tables = []
    for title, members in groups.items():
        if len({row["batch"] for row in members}) > 1:
            rates = _by_batch(members, lambda row: rate_label(_rate(row)))
            best = {"batch": "best"}
            for name in dict.fromkeys(row["provider"] for row in members):
                fastest = max((row for row in members if row["provider"] == name), key=_rate)
                best[name] = f"{rate_label(_rate(fastest))} at {fastest['batch']}"
            tables.append(Table(f"images/s by batch, {title}", [*rates, best]))
            if any(row["price_of_se"] for row in members):
                prices = _by_batch(members, lambda row: ratio_label(row["price_of_se"]))
                tables.append(Table(f"price of SE by batch, {title}", prices))
    return tables


def _rate(row: Row) -> float:
    return row["batch"] / row["median_s"]


def _by_batch(rows: Sequence[Row], label: Callable[[Row], str]) -> list[dict[str, str]]:
    """A line per batch, in order, with a cell per variant."""
    names = list(dict.fromkeys(row["provider"] for row in rows))
    lines = {}
    for row in sorted(rows, key=lambda row: row["batch"]):
        batch = f"{row['batch']}{' (max)' if row.get('largest_batch') else ''}"
        line = lines.setdefault(row["batch"], {"batch": batch} | dict.fromkeys(names, "-"))
        line[row["provider"]] = label(row)
    return list(lines.values())


def _summary_table(summary: Sequence[Row]) -> Table:
    lines = [
        {
            "mode": entry["mode"],
            "dtype": dtype_label(entry),
            "variant": entry["provider"],
            "vs stock": ratio_label(entry["speedup_vs_stock"]),
            "price of SE": ratio_label(entry["price_of_se"]),
            "cells": f"{entry['measured']}/{entry['cells']}",
        }
        for entry in summary
    ]
    return Table("Geometric means over models, batches and layouts", lines)


def render(header: Row, rows: Sequence[Row], summary: Sequence[Row], out: TextIO, plain: bool = False) -> None:
    """Prints what was measured and how, a table per model, mode, dtype, batch and layout, sweeps, and the summary."""
    show_header(header, _HEADER, out)
    show([*_tables(rows), *_sweeps(rows), _summary_table(summary)] if rows else [], out, plain)
