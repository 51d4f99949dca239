"""Progress on standard error. Nothing runs in the background: a display that refreshes itself disturbs the timing."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from .problems import Case
from .tables import console

__all__ = ["Progress", "open_progress"]


class Progress:
    """A line for every finished case, and on a terminal a bar below them, which is redrawn between samples."""

    def __init__(self, bar: Any, total: int, after: Callable[[], None]) -> None:
        self._bar, self._total, self._after = bar, total, after
        self._task = bar.add_task("", total=total)
        self._number, self._case, self._start, self._drawn = 0, "", 0.0, 0.0

    def case(self, case: Case) -> None:
        """A case begins."""
        self._number, self._start = self._number + 1, time.monotonic()
        self._case = f"{case.problem} {case.label} {case.dtype} {case.layout} {case.direction}"

    def stage(self, text: str) -> None:
        """What is done with the case now."""
        self._bar.update(self._task, description=f"{self._case}: {text}", refresh=True)

    def tick(self) -> None:
        """Called between samples, never within one."""
        if time.monotonic() - self._drawn > 0.5:
            self._drawn = time.monotonic()
            self._bar.refresh()

    def done(self) -> None:
        """The case is done."""
        seconds = time.monotonic() - self._start
        self._bar.print(f"[{self._number}/{self._total}] {self._case}: {seconds:.1f} s", soft_wrap=True)
        self._bar.update(self._task, advance=1, refresh=True)
        self._after()


@contextlib.contextmanager
def open_progress(total: int, plain: bool = False, after: Callable[[], None] = lambda: None) -> Iterator[Progress]:
    """The progress of so many cases. plain: without the bar. after: called when a case is done.

    Raises:
        RequestError: rich is not installed.
    """
    out = console(sys.stderr, plain)
    from rich import progress

    columns = (
        progress.BarColumn(bar_width=24),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TextColumn("{task.description}", markup=False),
    )
    silent = plain or not sys.stderr.isatty()
    with progress.Progress(*columns, console=out, auto_refresh=False, transient=True, disable=silent) as bar:
        yield Progress(bar, total, after)
