"""The demo's picture: the loss curves of the networks, and what a step, the SE layers and the blocks' tails cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["check_format", "draw"]

COLOURS = {"stock": "#E69F00", "fused": "#0072B2", "tails": "#009E73"}
GREY = "#8C8C8C"


def check_format(path: Path) -> None:
    """Raises ValueError if no picture can be written under this name; ImportError without matplotlib."""
    from matplotlib.backend_bases import FigureCanvasBase

    suffix = path.suffix.lower().removeprefix(".")
    if suffix not in FigureCanvasBase.get_supported_filetypes():
        raise ValueError(f"{path}: matplotlib writes no {suffix!r} pictures; name a .png, .svg or .pdf")


def draw(report: dict[str, Any], path: Path) -> None:
    """Writes the picture of a report (senet_fused.demo.comparison) to path; the suffix gives the format."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.8), dpi=150, layout="constrained")
    figure.suptitle(f"{report['network']} on {report['title']}", fontsize=12, fontweight="bold")
    columns = figure.add_gridspec(1, 2, width_ratios=(1.4, 1), wspace=0.06)
    rows = columns[0].subgridspec(2, 1, height_ratios=(2.6, 1), hspace=0.06)
    curves = figure.add_subplot(rows[0])
    _draw_losses(curves, report)
    _draw_distances(figure.add_subplot(rows[1], sharex=curves), report)
    _draw_times(figure.add_subplot(columns[1]), report)
    figure.savefig(path)


def _plain(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)


def _draw_losses(axes: Any, report: dict[str, Any]) -> None:
    losses, accuracy = report["loss"], report["accuracy"]
    steps = range(1, len(losses["stock"]) + 1)
    for key, share in accuracy.items():
        style = {"linewidth": 3.2, "alpha": 0.75} if key == "stock" else {"linewidth": 1.1}
        label = f"{report['names'][key]}: {share:.2%} of held-out images right"
        axes.plot(steps, losses[key], label=label, color=COLOURS[key], **style)
    axes.set_yscale("log")
    axes.set_ylabel("training loss")
    axes.set_title("Same seed, same batches: the loss, step by step", loc="left", fontsize=10)
    axes.legend(frameon=False, fontsize=9)
    axes.tick_params(labelbottom=False)
    _plain(axes)


def _draw_distances(axes: Any, report: dict[str, Any]) -> None:
    losses = report["loss"]
    steps = range(1, len(losses["stock"]) + 1)
    distances = [("nudged", "to itself, pixels one ulp off", GREY, 0.9)] if "nudged" in losses else []
    distances += [
        (key, f"to {report['names'][key]}", COLOURS[key], 1.1) for key in report["accuracy"] if key != "stock"
    ]
    for key, label, colour, width in distances:
        apart = [abs(a - b) or float("nan") for a, b in zip(losses["stock"], losses[key], strict=True)]
        axes.plot(steps, apart, color=colour, linewidth=width, label=label)
    axes.set_yscale("log")
    axes.set_ylabel("distance")
    axes.set_xlabel("step")
    axes.set_title(f"Distance of the loss of {report['names']['stock']} …", loc="left", fontsize=9)
    axes.legend(frameon=False, fontsize=8, loc="lower right", ncols=3, borderaxespad=0)
    _plain(axes)


def _draw_times(axes: Any, report: dict[str, Any]) -> None:
    groups = {
        "step_s": "training step",
        "se_s": f"{report['timed_layer']}\nforward + backward",
        "tail_s": "BatchNorm to ReLU\nforward + backward",
    }
    keys = list(report["accuracy"])
    width = 0.84 / len(keys)
    longest = max(report[group][key] for group in groups for key in keys if key in report[group]) * 1e3
    for place, group in enumerate(groups):
        times = report[group]
        present = [key for key in keys if key in times]
        for number, key in enumerate(present):
            value, left = times[key] * 1e3, place + (number - (len(present) - 1) / 2) * width
            label = report["names"][key] if place == 0 else None
            axes.bar(left, value, width=0.94 * width, color=COLOURS[key], label=label)
            axes.text(left, value, f"{value:.1f}", ha="center", va="bottom", fontsize=8)
            if key != "stock":
                above, ratio = value + 0.035 * longest, f"{times['ratio'][key]:.2f}x"
                axes.text(left, above, ratio, ha="center", va="bottom", fontsize=8, fontweight="bold")
    axes.set_xticks(range(len(groups)), groups.values(), fontsize=9)
    axes.set_ylim(0, longest * 1.3)
    axes.set_ylabel("median, ms (less is better)")
    threads = report["environment"]["threads"]
    title = f"Time on {threads} CPU thread{'s' * (threads > 1)}, {report['backend']} backend"
    axes.set_title(title, loc="left", fontsize=10)
    axes.legend(frameon=False, fontsize=9)
    _plain(axes)
