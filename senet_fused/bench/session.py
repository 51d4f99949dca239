"""What `bench` and `bench model` share: their options, and the way from cases to a report and an exit status."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..arguments import positive
from .saved import Row, kind_of, write_json

if TYPE_CHECKING:
    from .progress import Progress
    from .timing import Settings

__all__ = ["OUT_OF_TIME", "add_arguments", "measure", "report", "settings_of"]

OUT_OF_TIME = "not begun: out of time"  # a row's note, of a provider that --time-limit has left out


def add_arguments(parser: argparse.ArgumentParser, backend_of: str, default_budget: float) -> argparse._ArgumentGroup:
    """Adds the options of both commands; returns the group of those about output."""
    how = parser.add_argument_group("how it is measured")
    how.add_argument("--backend", metavar="NAME", help=f"of {backend_of} (default: SENET_FUSED_BACKEND, else auto)")
    how.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    how.add_argument("--threads", type=positive(int), metavar="N", help="CPU threads (default: PyTorch's own choice)")
    seconds = {"type": positive(float), "metavar": "SECONDS"}
    how.add_argument("--budget", **seconds, help=f"for the samples of one case (default {default_budget:g})")
    how.add_argument(
        "--time-limit", default=float("inf"), **seconds, help="begin nothing new after so long, and report what is done"
    )
    how.add_argument("--quick", action="store_true", help="a first look: little time per case, few samples")
    output = parser.add_argument_group("output")
    output.add_argument("--json", type=Path, metavar="FILE", help="header, rows and summary, saved after every case")
    output.add_argument("--plain", action="store_true", help="no colours and no progress bar")
    return output


def settings_of(args: argparse.Namespace, default_budget: float) -> Settings:
    """How long a case is measured, by --quick and --budget."""
    from . import timing

    settings = timing.QUICK if args.quick else timing.Settings(budget_s=default_budget)
    return settings if args.budget is None else dataclasses.replace(settings, budget_s=args.budget)


def report(args: argparse.Namespace, header: Row, rows: Sequence[Row]) -> None:
    """Prints the tables of a run, live or saved, and writes --json."""
    from . import model_report, report

    of_kind = model_report if kind_of(header) == "model" else report
    summary = of_kind.summarise(rows)
    of_kind.render(header, rows, summary, sys.stdout, args.plain)
    if args.json is not None:
        write_json(args.json, header, rows, summary)
        print(f"\nwrote {args.json}")


def measure(
    args: argparse.Namespace,
    total: int,
    rows_per_case: int,
    make_header: Callable[[], Row],
    run: Callable[[Progress, list[Row]], object],
) -> tuple[Row, list[Row], int]:
    """Measures, and saves what is done after every case.

    Args:
        total: how many cases there are. rows_per_case: how many rows each of them gives.
        make_header: called with the number of threads set that is measured.
        run: appends the rows of one case after the other.

    Returns:
        header, rows, exit status: 0; 1 if a row has an error; 130 if interrupted or out of time.
    """
    from . import model_report, report
    from .progress import open_progress
    from .runner import computing

    rows: list[Row] = []
    interrupted = False

    def left_out() -> int:
        return sum(OUT_OF_TIME in (row.get("note") or "") for row in rows)

    def so_far() -> Row:
        text = f"after {len(rows) // rows_per_case} of {total} cases"
        return header | {"interrupted": text + (f", {left_out()} variants not begun" if left_out() else "")}

    def save() -> None:
        if args.json is not None:
            summarise = (model_report if kind_of(header) == "model" else report).summarise
            write_json(args.json, so_far(), rows, summarise(rows))

    with computing(args.threads):
        header = make_header()
        try:
            with open_progress(total, args.plain, save) as progress:
                run(progress, rows)
        except KeyboardInterrupt:
            interrupted = True
    if args.time_limit < float("inf"):
        interrupted = interrupted or left_out() > 0 or len(rows) < total * rows_per_case
    if interrupted:
        return so_far(), rows, 130
    return header, rows, 1 if any(row["error"] for row in rows) else 0
