"""Tables of text: how figures are written, and how tables are shown, as plain text or by rich."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from .problems import GPU_BACKENDS

__all__ = ["Table", "error_label", "megabytes_label", "rate_label", "ratio_label", "share_label", "show",
           "show_header", "time_label"]  # fmt: skip

_TEXT_COLUMNS = {"N x C/R @ plane", "layout", "cache", "provider", "ran on", "problem", "dtype", "direction",
                 "slowest cell", "variant", "model", "mode", "verdict"}  # fmt: skip
# What a narrow terminal can do without, first to go first.
_DISPENSABLE = ("GB/s", "IQR", "ran on", "images/s", "behind", "max error", "of copy", "peak MB", "saved MB",
                "gradients", "output")  # fmt: skip
# Who stands out: this package's own.
_OURS = ("fused", "tails", *GPU_BACKENDS)


def time_label(seconds: float | None) -> str:
    """Seconds in the unit that suits them: ``1.23 ms``."""
    if seconds is None:
        return "-"
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if seconds * scale >= 1 or unit == "us":
            return f"{seconds * scale:.3g} {unit}" if seconds * scale < 1000 else f"{seconds * scale:.0f} {unit}"
    raise AssertionError


def rate_label(value: float | None) -> str:
    """How many in a second."""
    return "-" if value is None else f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def ratio_label(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}" if value < 100 else f"{value:.0f}"


def share_label(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}" if value >= 0.095 else f"{value:.1%}"


def megabytes_label(size: int | None, of_stock: float | None) -> str:
    """Bytes in MB, and what they are more or less than stock's: ``25.7 (-21%)``."""
    if size is None:
        return "-"
    text = f"{size / 1e6:.3g}" if size < 1e9 else f"{size / 1e6:.0f}"
    return text if of_stock is None else f"{text} ({of_stock - 1:+.0%})"


def error_label(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"


@dataclasses.dataclass
class Table:
    """Rows of cells by column head; a row with an "error" has only its first cells, and the text.

    notes are lines below the table.
    """

    title: str
    rows: list[dict[str, str]]
    notes: Sequence[str] = ()

    @property
    def heads(self) -> list[str]:
        return list(dict.fromkeys(head for row in self.rows for head in row if head != "error"))

    def width(self, head: str) -> int:
        return max(len(head), *(len(row.get(head, "")) for row in self.rows))


def _plain(table: Table, out: TextIO) -> None:
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
    for note in table.notes:
        print(note, file=out)


def _rich(tables: Sequence[Table], out: TextIO) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table as Grid
    from rich.text import Text

    console = Console(file=out, highlight=False)
    for table in tables:
        heads, left_out = table.heads, []
        for head in _DISPENSABLE:
            if head in heads and sum(table.width(h) + 3 for h in heads) > console.width:
                heads.remove(head)
                left_out.append(head)
        grid = Grid(title=table.title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD,
                    pad_edge=False, padding=(0, 1))  # fmt: skip
        for head in heads:
            grid.add_column(head, justify="left" if head in _TEXT_COLUMNS else "right", no_wrap=head != "slowest cell")
        errors = []
        for row in table.rows:
            who = row.get("provider") or row.get("variant", "")
            style = "bold" if who in _OURS else "dim" if who == "copy" else ""
            if "error" in row:
                errors.append(row["error"])
                style = "red"
                # Where no row has more than the first cells, in the last of them.
                free = next((head for head in heads if head not in row), heads[-1])
                row = row | {free: f"{row.get(free, '')} ERROR [{len(errors)}]".strip()}
            grid.add_row(*(Text(row.get(head, ""), style=style) for head in heads))
        console.print()
        console.print(grid)
        for number, error in enumerate(errors, 1):
            console.print(Text(f"[{number}] {error}", style="red"))
        for note in table.notes:
            console.print(Text(note))
        if left_out:
            console.print(Text(f"no room for: {', '.join(left_out)} (the JSON has them)", style="dim"))


def show_header(header: Mapping[str, Any], names: Sequence[str], out: TextIO) -> None:
    """Prints those entries of a header that it has, one a line."""
    for name in names:
        value = header.get(name)
        if isinstance(value, dict):
            value = ", ".join(f"{key} {text}" for key, text in value.items() if text is not None)
        if value is not None:
            print(f"{name.replace('_', ' ') + ':':12} {value}", file=out)


def show(tables: Sequence[Table], out: TextIO, plain: bool = False) -> None:
    """Prints tables; on a terminal they are rich's, if rich is installed and not plain."""
    if out.isatty() and not plain:
        try:
            _rich(tables, out)
            return
        except ImportError:
            pass
    for table in tables:
        _plain(table, out)
