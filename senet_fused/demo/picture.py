"""The demo's picture: the loss curves of the networks, and the times of a step, of SE layers and of block tails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .comparison import NAMES

__all__ = ["draw"]

COLOURS = {"stock": "#E69F00", "fused": "#0072B2", "tails": "#009E73", "nudged": "#8C8C8C"}


def draw(report: dict[str, Any], path: Path) -> None:
    """Writes the picture of a report (senet_fused.demo.comparison) to path; the suffix gives the format."""
    from matplotlib import style
    from matplotlib.figure import Figure

    with style.context("seaborn-v0_8-whitegrid"):
        figure = Figure(figsize=(12, 4.8), dpi=150, layout="constrained")
        figure.suptitle(report["title"], fontsize=12, fontweight="bold")
        columns = figure.add_gridspec(1, 2, width_ratios=(1.4, 1), wspace=0.06)
        rows = columns[0].subgridspec(2, 1, height_ratios=(2.6, 1), hspace=0.06)
        curves = figure.add_subplot(rows[0])
        _draw_losses(curves, report)
        _draw_distances(figure.add_subplot(rows[1], sharex=curves), report)
        _draw_times(figure.add_subplot(columns[1]), report)
        figure.savefig(path)


def _draw_losses(axes: Any, report: dict[str, Any]) -> None:
    for key, share in report["accuracy"].items():
        losses = report["loss"][key]
        style = {"linewidth": 3.2, "alpha": 0.75} if key == "stock" else {"linewidth": 1.1}
        label = f"{NAMES[key]}: {share:.2%} of held-out images right"
        axes.plot(range(1, len(losses) + 1), losses, label=label, color=COLOURS[key], **style)
    axes.set(yscale="log", ylabel="training loss", title="Same seed, same batches: the loss, step by step")
    axes.legend()
    axes.tick_params(labelbottom=False)


def _draw_distances(axes: Any, report: dict[str, Any]) -> None:
    losses = report["loss"]
    for key in sorted(report["distance"], key=lambda key: key != "nudged"):  # the grey one behind the others
        apart = [abs(a - b) or float("nan") for a, b in zip(losses["stock"], losses[key], strict=True)]
        label = "itself, pixels one ulp off" if key == "nudged" else NAMES[key]
        axes.plot(range(1, len(apart) + 1), apart, color=COLOURS[key], linewidth=1, label=f"to {label}")
    title = f"Distance of the loss curve of {NAMES['stock']} …"
    axes.set(yscale="log", ylabel="distance", xlabel="step", title=title)
    axes.legend(fontsize=8, loc="lower right", ncols=3, borderaxespad=0)


def _draw_times(axes: Any, report: dict[str, Any]) -> None:
    groups = report["median_s"]
    keys = list(report["accuracy"])
    width = 0.84 / len(keys)
    for place, times in enumerate(groups.values()):
        present = [key for key in keys if key in times]
        for number, key in enumerate(present):
            label = NAMES[key] if place == 0 else None
            left = place + (number - (len(present) - 1) / 2) * width
            bar = axes.bar(left, times[key] * 1e3, width=0.94 * width, color=COLOURS[key], label=label)
            ratio = f"{times['stock'] / times[key]:.2f}x\n" if key != "stock" and "stock" in times else ""
            axes.bar_label(bar, [f"{ratio}{times[key] * 1e3:.1f}"], fontsize=8)
    axes.set_xticks(
        range(len(groups)), [part if part == "training step" else f"{part}\nforward + backward" for part in groups]
    )
    axes.margins(y=0.25)
    threads = report["environment"]["threads"]
    title = f"Time on {threads} CPU thread{'s' * (threads > 1)}, {report['backend']} backend"
    axes.set(ylabel="median, ms (less is better)", title=title)
    axes.legend()
