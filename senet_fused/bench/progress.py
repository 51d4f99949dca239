"""Progress on the terminal. Nothing runs in the background: a self-refreshing display disturbs the timing."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TextIO

from .problems import Case

__all__ = ["Lines", "open_progress"]


def _text(case: Case) -> str:
    return f"{case.problem} {case.label} {case.dtype} {case.layout} {case.direction}"


class Lines:
    """One line per finished case."""

    def __init__(self, total: int, out: TextIO, after: Callable[[], None] = lambda: None) -> None:
        self._total, self._out, self._after = total, out, after
        self._number, self._case, self._start = 0, "", 0.0

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def case(self, case: Case) -> None:
        self._number, self._case, self._start = self._number + 1, _text(case), time.monotonic()

    def stage(self, text: str) -> None:
        pass

    def tick(self) -> None:
        pass

    def done(self) -> None:
        seconds = time.monotonic() - self._start
        print(f"[{self._number}/{self._total}] {self._case}: {seconds:.1f} s", file=self._out, flush=True)
        self._after()


class _Bar:
    """A rich progress bar, redrawn only between samples."""

    def __init__(self, total: int, out: TextIO, after: Callable[[], None]) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        self._bar = Progress(
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}"),
            console=Console(file=out),
            auto_refresh=False,
            transient=True,
        )
        self._task = self._bar.add_task("", total=total)
        self._case, self._drawn, self._after = "", 0.0, after

    def __enter__(self) -> _Bar:
        self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.stop()

    def case(self, case: Case) -> None:
        self._case = _text(case)

    def stage(self, text: str) -> None:
        self._bar.update(self._task, description=f"{self._case}: {text}")
        self._bar.refresh()

    def tick(self) -> None:
        if time.monotonic() - self._drawn > 0.5:
            self._drawn = time.monotonic()
            self._bar.refresh()

    def done(self) -> None:
        self._bar.advance(self._task)
        self._bar.refresh()
        self._after()


def open_progress(total: int, plain: bool = False, after: Callable[[], None] = lambda: None) -> Lines | _Bar:
    """A bar if standard error is a terminal and rich is installed, else lines. after: called when a case is done."""
    if not plain and sys.stderr.isatty():
        try:
            return _Bar(total, sys.stderr, after)
        except ImportError:
            pass
    return Lines(total, sys.stderr, after)
