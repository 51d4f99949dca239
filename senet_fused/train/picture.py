"""The demo's picture: the loss curves of both networks, and what a step and the SE layers cost in each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["check_format", "draw"]

STOCK_COLOUR = "#E69F00"
FUSED_COLOUR = "#0072B2"
GREY = "#8C8C8C"


def check_format(path: Path) -> None:
    """Raises ValueError if no picture can be written under this name; ImportError without matplotlib."""
    from matplotlib.backend_bases import FigureCanvasBase

    suffix = path.suffix.lower().removeprefix(".")
    if suffix not in FigureCanvasBase.get_supported_filetypes():
        raise ValueError(f"{path}: matplotlib writes no {suffix!r} pictures; name a .png, .svg or .pdf")


def draw(report: dict[str, Any], path: Path) -> None:
    """Writes the picture of a report (senet_fused.train.comparison) to path; the suffix gives the format."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.8), dpi=150, layout="constrained")
    figure.suptitle(f"{report['network']} on {report['title']}", fontsize=12, fontweight="bold")
    columns = figure.add_gridspec(1, 2, width_ratios=(1.55, 1), wspace=0.06)
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
    for key, label, style in (
        ("stock", report["names"]["stock"], {"color": STOCK_COLOUR, "linewidth": 3.2, "alpha": 0.75}),
        ("fused", report["names"]["fused"], {"color": FUSED_COLOUR, "linewidth": 1.1}),
    ):
        axes.plot(steps, losses[key], label=f"{label}: {accuracy[key]:.2%} of held-out images right", **style)
    axes.set_yscale("log")
    axes.set_ylabel("training loss")
    axes.set_title("Same seed, same batches: the loss, step by step", loc="left", fontsize=10)
    axes.legend(frameon=False, fontsize=9)
    axes.tick_params(labelbottom=False)
    _plain(axes)


def _draw_distances(axes: Any, report: dict[str, Any]) -> None:
    losses = report["loss"]
    steps = range(1, len(losses["stock"]) + 1)
    distances = [("fused", f"to {report['names']['fused']}", FUSED_COLOUR, 1.1)]
    if "nudged" in losses:
        distances.insert(0, ("nudged", "to itself with every pixel one ulp off", GREY, 0.9))
    for key, label, colour, width in distances:
        apart = [abs(a - b) or float("nan") for a, b in zip(losses["stock"], losses[key], strict=True)]
        axes.plot(steps, apart, color=colour, linewidth=width, label=label)
    axes.set_yscale("log")
    axes.set_ylabel("distance")
    axes.set_xlabel("step")
    axes.set_title(f"Distance of the loss of {report['names']['stock']} …", loc="left", fontsize=9)
    axes.legend(frameon=False, fontsize=8, loc="lower right", ncols=2, borderaxespad=0)
    _plain(axes)


def _draw_times(axes: Any, report: dict[str, Any]) -> None:
    groups = {"step_s": "training step", "se_s": f"{report['timed_layer']}\nforward + backward"}
    longest = max(report[key]["stock"] for key in groups) * 1e3
    for place, key in enumerate(groups):
        times = report[key]
        for offset, who, colour in ((-0.2, "stock", STOCK_COLOUR), (0.2, "fused", FUSED_COLOUR)):
            value = times[who] * 1e3
            label = report["names"][who] if place == 0 else None
            axes.bar(place + offset, value, width=0.38, color=colour, label=label)
            axes.text(place + offset, value, f"{value:.1f} ms", ha="center", va="bottom", fontsize=9)
        top = max(times["stock"], times["fused"]) * 1e3 + 0.06 * longest
        axes.text(
            place, top, f"{times['ratio']:.2f}x", ha="center", va="bottom", fontsize=13, fontweight="bold"
        )
    axes.set_xticks(range(len(groups)), groups.values())
    axes.set_ylim(0, longest * 1.2)
    axes.set_ylabel("median, ms (less is better)")
    threads = report["environment"]["threads"]
    title = f"Time on {threads} CPU thread{'s' * (threads > 1)}, {report['backend']} backend"
    axes.set_title(title, loc="left", fontsize=10)
    axes.legend(frameon=False, fontsize=9)
    _plain(axes)
