"""The picture of a run, from its CSV files: loss and learning rate step by step, accuracy epoch by epoch."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

__all__ = ["draw"]

LOSS, MODEL, AVERAGE, RATE, GREY = "#0072B2", "#009E73", "#D55E00", "#CC79A7", "#8C8C8C"
_SMOOTHED = 50  # steps that a loss is averaged over, of long runs; at most a tenth of a short one


def draw(folder: Path) -> Path:
    """Writes curves.png beside the log.csv and epochs.csv that it is made from.

    Raises:
        ImportError: matplotlib is missing.
    """
    from matplotlib.figure import Figure

    steps, epochs = _columns(folder / "log.csv"), _columns(folder / "epochs.csv")
    figure = Figure(figsize=(12, 4.2), dpi=150, layout="constrained")
    figure.suptitle(folder.resolve().name, fontsize=11, fontweight="bold")
    loss, accuracy, rate = figure.subplots(1, 3)
    _draw_loss(loss, steps)
    _draw_accuracy(accuracy, epochs)
    rate.plot(steps["step"], steps["learning_rate"], color=RATE)
    rate.set_ylim(bottom=0)
    _finish(rate, "learning rate", "step")
    path = folder / "curves.png"
    figure.savefig(path)
    return path


def _columns(path: Path) -> dict[str, list[float | None]]:
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
        return {name: [float(row[name]) if row[name] else None for row in rows] for name in reader.fieldnames or ()}


def _draw_loss(axes: Any, steps: dict[str, list[Any]]) -> None:
    losses = steps["loss"]
    window = max(1, min(_SMOOTHED, len(losses) // 10))
    axes.plot(steps["step"], losses, color=GREY, linewidth=0.6, alpha=0.6, label="of each step")
    if window > 1:
        means = [sum(losses[i - window : i]) / window for i in range(window, len(losses) + 1)]
        axes.plot(steps["step"][window - 1 :], means, color=LOSS, label=f"mean of the last {window} steps")
    if losses and min(losses) > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        # Numbers between powers of ten only where there are few of those.
        axes.yaxis.set_minor_formatter("{x:g}" if max(losses) < 10 * min(losses) else "")
    axes.legend(frameon=False, fontsize=8)
    _finish(axes, "training loss", "step")


def _draw_accuracy(axes: Any, epochs: dict[str, list[Any]]) -> None:
    for name, label, colour, style in (
        ("accuracy", "top-1", MODEL, "-"),
        ("top5", "top-5", MODEL, ":"),
        ("ema_accuracy", "top-1, averaged weights", AVERAGE, "-"),
        ("ema_top5", "top-5, averaged weights", AVERAGE, ":"),
    ):
        shown = [(x, 100 * y) for x, y in zip(epochs["epoch"], epochs[name], strict=True) if y is not None]
        if shown:
            last = f"{label}: {shown[-1][1]:.2f} %"
            axes.plot(*zip(*shown, strict=True), style, color=colour, marker="o", markersize=2.5, label=last)
    if epochs["epoch"]:
        axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(0, -0.14), ncols=2)
    axes.xaxis.get_major_locator().set_params(integer=True)
    _finish(axes, "accuracy on held-out images, %", "epoch")


def _finish(axes: Any, title: str, below: str) -> None:
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel(below)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
