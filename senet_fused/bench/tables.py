"""Tables on the terminal: how figures are written, and how rich shows them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from ..arguments import RequestError
from .problems import GPU_BACKENDS

__all__ = [
    "Table", "console", "error_label", "megabytes_label", "rate_label", "ratio_label", "share_label", "show",
    "show_header", "time_label",
]  # fmt: skip

_TEXT_COLUMNS = {
    "N x C/R @ plane", "layout", "cache", "provider", "ran on", "problem", "dtype", "direction", "slowest cell",
    "variant", "model", "mode", "verdict",
}  # fmt: skip
_BOLD = ("fused", "tails", *GPU_BACKENDS)
_UNLIMITED = 10_000  # columns: a terminal wraps what is too long, rich would cut it


def time_label(seconds: float | None) -> str:
    """Seconds in the unit that suits them: ``1.23 ms``."""
    if seconds is None:
        return "-"
    unit, scale = ("s", 1.0) if seconds >= 1 else ("ms", 1e3) if seconds >= 1e-3 else ("us", 1e6)
    return f"{rate_label(seconds * scale)} {unit}"


def rate_label(value: float | None) -> str:
    """Three digits, and no exponent: ``0.512``, ``25.7``, ``1234``."""
    return "-" if value is None else f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def ratio_label(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}" if value < 100 else f"{value:.0f}"


def share_label(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}" if value >= 0.095 else f"{value:.1%}"


def megabytes_label(size: int | None, of_stock: float | None) -> str:
    """Bytes in MB, and how much more or less than stock's: ``25.7 (-21%)``."""
    if size is None:
        return "-"
    return rate_label(size / 1e6) + ("" if of_stock is None else f" ({of_stock - 1:+.0%})")


def error_label(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"


@dataclasses.dataclass
class Table:
    """Rows of cells by column head; a row with an "error" has its first cells, and the text. notes: lines below."""

    title: str
    rows: list[dict[str, str]]
    notes: Sequence[str] = ()


def console(out: TextIO, plain: bool = False, width: int | None = None) -> Any:
    """rich's console on this stream. plain: without colours. width: None for the terminal's.

    Raises:
        RequestError: rich is not installed.
    """
    try:
        from rich.console import Console
    except ImportError:
        raise RequestError("tables and progress need rich: pip install 'senet-fused[bench]'") from None
    options = {"color_system": None} if plain else {}
    return Console(file=out, width=width, highlight=False, markup=False, emoji=False, **options)


def show(tables: Sequence[Table], out: TextIO, plain: bool = False) -> None:
    """Prints tables."""
    to = console(out, plain, _UNLIMITED)
    from rich import box
    from rich.table import Table as Grid

    for table in tables:
        heads = list(dict.fromkeys(head for row in table.rows for head in row if head != "error"))
        grid = Grid(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
        for head in heads:
            grid.add_column(head, justify="left" if head in _TEXT_COLUMNS else "right")
        for row in table.rows:
            name = row.get("provider", row.get("variant"))
            style = "bold" if name in _BOLD else "dim" if name == "copy" else None
            grid.add_row(*(row.get(head, "") for head in heads), style=None if "error" in row else style)
        with to.capture() as captured:
            to.print(grid)
        to.print(f"\n{table.title}" if table.title else "", style="bold")
        head, rule, *lines = captured.get().splitlines()
        print(head.rstrip(), rule, sep="\n", file=out)
        for line, row in zip(lines, table.rows, strict=True):
            if "error" in row:
                to.print(f"{line.rstrip()}  ERROR {row['error']}", style="red")
            else:
                print(line.rstrip(), file=out)
        for note in table.notes:
            to.print(note)


def show_header(header: Mapping[str, Any], out: TextIO) -> None:
    """Prints what was measured on, and what a reader has to know of a run, one entry a line."""
    for name in ("device", "versions", "threads", "revision", "cache", "warning", "interrupted"):
        value = header.get(name)
        if isinstance(value, dict):
            value = ", ".join(f"{key} {text}" for key, text in value.items() if text is not None)
        if value is not None:
            print(f"{name + ':':12} {value}", file=out)
