"""What a run leaves to be read: CSV files, TensorBoard's events, and lines on the terminal."""

from __future__ import annotations

import contextlib
import csv
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["EPOCHS", "STEPS", "RunLog", "Table"]

STEPS = ("step", "epoch", "loss", "learning_rate", "images_per_second")
EPOCHS = ("epoch", "step", "train_loss", "accuracy", "top5", "ema_accuracy", "ema_top5", "seconds")
_LINE_EVERY_S = 5.0


class Table:
    """A CSV file with a header that grows by rows, whose first column ascends.

    Args:
        kept: rows of an existing file with first columns 1 to ``kept`` stay; the following ones, which a run wrote
            after the checkpoint that it resumes from, are removed. 0 for a new file.
    """

    def __init__(self, path: Path, columns: tuple[str, ...], kept: int) -> None:
        self._columns = columns
        size = _size_of_rows(path, kept) if kept and path.is_file() else 0
        self._file = path.open("a" if size else "w", newline="", encoding="utf-8")
        self._file.truncate(size)
        self._writer = csv.writer(self._file, lineterminator="\n")
        if not size:
            self._writer.writerow(columns)

    def write(self, row: Mapping[str, Any]) -> None:
        """One row; a column that is missing or None stays empty."""
        self._writer.writerow(["" if row.get(name) is None else row[name] for name in self._columns])

    def sync(self) -> None:
        """Brings all rows to the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _size_of_rows(path: Path, kept: int) -> int:
    """The length in bytes of the header and the rows up to number ``kept``."""
    size = 0
    with path.open("rb") as file:
        for number, line in enumerate(file):
            first = line.partition(b",")[0]
            if not line.endswith(b"\n") or number and not (first.isdigit() and int(first) <= kept):
                break
            size += len(line)
    return size


class RunLog:
    """log.csv, epochs.csv and TensorBoard's events of a folder, and the terminal.

    Args:
        step, epoch: steps and epochs whose rows stay: those that are over in the checkpoint to resume from, or 0.
    """

    def __init__(self, folder: Path, *, step: int, epoch: int, tensorboard: bool) -> None:
        self.steps = Table(folder / "log.csv", STEPS, step)
        self.epochs = Table(folder / "epochs.csv", EPOCHS, epoch)
        self._last_line = -math.inf
        self._events = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                self.say(f"No TensorBoard events: {error}. pip install tensorboard, or --tensorboard off")
            else:
                # Hides the events after the checkpoint that an earlier process has logged.
                self._events = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def say(self, line: str) -> None:
        """A line on the terminal."""
        print(line, flush=True)

    def progress(self, done: int, total: int, text: str) -> None:
        """A line every few seconds."""
        if time.monotonic() - self._last_line >= _LINE_EVERY_S or done == total:
            self._last_line = time.monotonic()
            self.say(f"step {done}/{total}  {text}")

    def write_steps(self, rows: Sequence[dict[str, Any]]) -> None:
        """Rows with the columns STEPS, at once on the disk."""
        for row in rows:
            self.steps.write(row)
            self._scalars("train", row, ("loss", "learning_rate", "images_per_second"))
        self.steps.sync()

    def write_epoch(self, row: dict[str, Any]) -> None:
        """A row with the columns EPOCHS, at once on the disk."""
        self.epochs.write(row)
        self._scalars("held out", row, ("accuracy", "top5", "ema_accuracy", "ema_top5"))
        self.epochs.sync()

    def _scalars(self, group: str, row: dict[str, Any], names: tuple[str, ...]) -> None:
        if self._events is not None:
            for name in names:
                if row.get(name) is not None:
                    self._events.add_scalar(f"{group}/{name}", row[name], row["step"])

    def close(self) -> None:
        with contextlib.ExitStack() as stack:  # each, even if another fails: the disk may be full
            if self._events is not None:
                stack.callback(self._events.close)
            for table in (self.steps, self.epochs):
                stack.callback(table.close)
