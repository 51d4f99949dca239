"""What a run leaves to be read: CSV files, TensorBoard's events, and progress on the terminal."""

from __future__ import annotations

import contextlib
import csv
import errno
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..arguments import RequestError

__all__ = ["EPOCHS", "STEPS", "Bar", "Lines", "RunLog", "Table", "not_written", "open_progress", "writing"]

STEPS = ("step", "epoch", "loss", "learning_rate", "images_per_second")
EPOCHS = ("epoch", "step", "train_loss", "accuracy", "top5", "ema_accuracy", "ema_top5", "seconds")
_LINE_EVERY_S = 5.0
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def not_written(folder: Path, error: OSError) -> RequestError:
    """What to tell of a file in a run's folder that cannot be written."""
    what = error.filename if isinstance(error.filename, str) else f"into {folder}"
    todo = "Make room there" if error.errno in _NO_ROOM else "Make it writable, or move away what is in its place"
    return RequestError(
        f"cannot write {what}: {error.strerror or error}. {todo}; --resume goes on from the last checkpoint"
    )


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Within the block files of a run's folder are opened or written: an OSError is a RequestError."""
    try:
        yield
    except BrokenPipeError:  # of the terminal
        raise
    except OSError as error:
        raise not_written(folder, error) from error


class Table:
    """A CSV file with a header that grows by rows.

    Args:
        offset: how long the file was when the checkpoint was written; what is behind it is cut off. None for a new
            file. Where the file is missing, or shorter, a new one begins.
    """

    def __init__(self, path: Path, columns: tuple[str, ...], offset: int | None = None) -> None:
        self.path, self._columns = path, columns
        self.continued = offset is not None and path.is_file() and path.stat().st_size >= offset
        self._file = path.open("r+" if self.continued else "w", newline="", encoding="utf-8")
        self._writer = csv.writer(self._file, lineterminator="\n")
        if self.continued:
            self._file.truncate(offset)
            self._file.seek(0, 2)
        else:
            self._writer.writerow(columns)

    def write(self, row: Mapping[str, Any]) -> None:
        """One row; a column that is missing or None stays empty."""
        self._writer.writerow(["" if row.get(name) is None else row[name] for name in self._columns])

    def offset(self) -> int:
        """How long the file is, once all of it has reached the disk, as a checkpoint will that tells of it."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        self._file.close()


class Lines:
    """A line every few seconds."""

    def __init__(self) -> None:
        self._last = -math.inf

    def say(self, line: str) -> None:
        print(line, flush=True)

    def progress(self, done: int, total: int, text: str) -> None:
        if time.monotonic() - self._last >= _LINE_EVERY_S or done == total:
            self._last = time.monotonic()
            self.say(f"step {done}/{total}  {text}")

    def close(self) -> None:
        """Nothing is left open."""


class Bar(Lines):
    """A bar of rich at the bottom of the terminal, redrawn when there is news."""

    def __init__(self) -> None:
        from rich import progress
        from rich.console import Console

        super().__init__()
        columns = (progress.BarColumn(bar_width=24), progress.MofNCompleteColumn(),
                   progress.TextColumn("{task.description}"))  # fmt: skip
        self._bar = progress.Progress(*columns, console=Console(), auto_refresh=False, transient=True)
        self._bar.start()
        self._task = self._bar.add_task("", total=None)

    def say(self, line: str) -> None:
        self._bar.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def progress(self, done: int, total: int, text: str) -> None:
        self._bar.update(self._task, completed=done, total=total, description=text, refresh=True)

    def close(self) -> None:
        self._bar.stop()


def open_progress(plain: bool) -> Lines:
    """A bar if standard output is a terminal and rich is installed, else lines."""
    if not plain and sys.stdout.isatty():
        try:
            return Bar()
        except ImportError:
            pass
    return Lines()


def _open_tensorboard(folder: Path, first_step: int, say: Callable[[str], None]) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        say(f"No TensorBoard events: {error}. pip install tensorboard, or --tensorboard off")
        return None
    # Steps from the first one on that an earlier, longer-lived process has logged are hidden.
    return SummaryWriter(str(folder), purge_step=first_step if first_step > 1 else None)


class RunLog:
    """log.csv, epochs.csv and TensorBoard's events of one folder, and the terminal.

    Args:
        offsets: those of :meth:`offsets` when the checkpoint was written that the run goes on from; None for a new one.
        step: steps done so far.
    """

    def __init__(
        self, folder: Path, progress: Lines, *, offsets: Mapping[str, int] | None, step: int, tensorboard: bool
    ) -> None:
        self.terminal = progress
        self.say = progress.say
        offsets = offsets or {}
        self.steps = Table(folder / "log.csv", STEPS, offsets.get("log.csv"))
        self.epochs = Table(folder / "epochs.csv", EPOCHS, offsets.get("epochs.csv"))
        for table in (self.steps, self.epochs):
            if table.path.name in offsets and not table.continued:
                self.say(f"{table.path} is not as long as it was when the checkpoint was written: it begins anew.")
        self._events = _open_tensorboard(folder, step + 1, self.say) if tensorboard else None

    def offsets(self) -> dict[str, int]:
        """How long the files are."""
        return {table.path.name: table.offset() for table in (self.steps, self.epochs)}

    def write_steps(self, rows: Sequence[dict[str, Any]]) -> None:
        """Rows with the columns STEPS. Whoever reads log.csv meanwhile finds them."""
        for row in rows:
            self.steps.write(row)
            self._scalars("train", row, ("loss", "learning_rate", "images_per_second"))
        self.steps.offset()

    def epoch(self, row: dict[str, Any]) -> None:
        """A row with the columns EPOCHS."""
        self.epochs.write(row)
        self._scalars("held out", row, ("accuracy", "top5", "ema_accuracy", "ema_top5"))

    def _scalars(self, group: str, row: dict[str, Any], names: tuple[str, ...]) -> None:
        if self._events is not None:
            for name in names:
                if row.get(name) is not None:
                    self._events.add_scalar(f"{group}/{name}", row[name], row["step"])

    def close(self) -> None:
        with contextlib.ExitStack() as stack:  # each, even where another fails: the disk may be full
            stack.callback(self.terminal.close)
            if self._events is not None:
                stack.callback(self._events.close)
            for table in (self.steps, self.epochs):
                stack.callback(table.close)
