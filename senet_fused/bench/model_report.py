"""Rows of whole networks as tables and a summary."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TextIO

from .saved import Row, geometric_mean, grouped
from .tables import Table, error_label, megabytes_label, rate_label, ratio_label, show, show_header, time_label

__all__ = ["dtype_label", "input_label", "render", "summarise"]


def input_label(row: Row) -> str:
    """``8 x 3x224x224``: the batch size and the shape of one input."""
    return f"{row['batch']} x {row['size'].replace(',', 'x')}"


def dtype_label(row: Row) -> str:
    return f"{row['dtype']} by autocast" if row["amp"] else row["dtype"]


def summarise(rows: Sequence[Row]) -> list[Row]:
    """One entry per (mode, dtype, amp, provider), over models, batches and layouts: geometric means.

    measured of cells have a time.
    """
    keys = ("mode", "dtype", "amp", "provider")
    return [
        dict(zip(keys, group, strict=True))
        | {value: geometric_mean(row[value] for row in members) for value in ("speedup_vs_stock", "price_of_se")}
        | {"measured": sum(row["median_s"] is not None for row in members), "cells": len(members)}
        for group, members in grouped(rows, lambda row: tuple(row[key] for key in keys)).items()
    ]


def _table(title: str, rows: Sequence[Row]) -> Table:
    lines = []
    for row in rows:
        cells = {"variant": row["provider"]}
        if row["error"]:
            lines.append(cells | {"error": row["error"]})
            continue
        cells |= {
            "ran on": row["backend"] or "-",
            "median": time_label(row["median_s"]),
            "IQR": time_label(row["iqr_s"]),
            "images/s": rate_label(_rate(row)),
            "vs stock": ratio_label(row["speedup_vs_stock"]),
            "price of SE": ratio_label(row["price_of_se"]),
        }
        training = row["mode"] == "training"
        if training:
            for what in ("saved", "peak"):  # which runs of earlier releases may lack
                of_stock = None if row["provider"] == "stock" else row.get(f"{what}_vs_stock")
                cells[f"{what} MB"] = megabytes_label(row.get(f"{what}_bytes"), of_stock)
        cells["output"] = error_label(row["output_error"])
        lines.append(cells | ({"gradients": error_label(row["gradient_error"])} if training else {}))
    return Table(title, lines, [f"{row['provider']}: {row['note']}" for row in rows if row["note"]])


def _tables(rows: Sequence[Row]) -> list[Table]:
    """One per model, mode, dtype, batch and layout."""

    def title(row: Row) -> str:
        return f"{row['model']}: {row['mode']}, {dtype_label(row)}, {input_label(row)}, {row['layout']}"

    return [_table(text, members) for text, members in grouped(rows, title).items()]


def _sweeps(rows: Sequence[Row]) -> list[Table]:
    """Images/s and the price of SE by batch and variant, for what was measured at more than one batch."""

    def title(row: Row) -> str:
        size = row["size"].replace(",", "x")
        return f"{row['model']}: {row['mode']}, {dtype_label(row)}, {size}, {row['layout']}"

    tables = []
    for text, members in grouped([row for row in rows if row["median_s"]], title).items():
        if len({row["batch"] for row in members}) > 1:
            best = {"batch": "best"}
            for name, its in grouped(members, lambda row: row["provider"]).items():
                fastest = max(its, key=_rate)
                best[name] = f"{rate_label(_rate(fastest))} at {fastest['batch']}"
            rates = _by_batch(members, lambda row: rate_label(_rate(row)))
            tables.append(Table(f"images/s by batch, {text}", [*rates, best]))
            if any(row["price_of_se"] for row in members):
                prices = _by_batch(members, lambda row: ratio_label(row["price_of_se"]))
                tables.append(Table(f"price of SE by batch, {text}", prices))
    return tables


def _rate(row: Row) -> float | None:
    return row["batch"] / row["median_s"] if row["median_s"] else None


def _by_batch(rows: Sequence[Row], label: Callable[[Row], str]) -> list[dict[str, str]]:
    """A line per batch, in order, with a cell per variant."""
    empty = dict.fromkeys((row["provider"] for row in rows), "-")
    lines = []
    for batch, members in grouped(sorted(rows, key=lambda row: row["batch"]), lambda row: row["batch"]).items():
        largest = any(row.get("largest_batch") for row in members)
        cells = {row["provider"]: label(row) for row in members}
        lines.append({"batch": f"{batch}{' (max)' if largest else ''}"} | empty | cells)
    return lines


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
    show_header(header, out)
    show([*_tables(rows), *_sweeps(rows), _summary_table(summary)] if rows else [], out, plain)
