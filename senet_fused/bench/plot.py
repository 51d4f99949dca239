"""Rows as pictures: how much faster than eager, and bandwidths by the tensor's size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .report import group_of, op_of, shape_label, size_label, tensor_bytes
from .saved import Row, geometric_mean, grouped

__all__ = ["STYLES", "draw", "draw_roofline"]

# Colour, label and marker of a provider.
STYLES = {
    "eager": ("#9a9a9a", "eager", "s"),
    "compile": ("#e2902f", "torch.compile", "^"),
    "max-autotune": ("#a8481f", "torch.compile max-autotune", "v"),
    "fused": ("#2268a8", "senet_fused", "o"),
    "cuda": ("#6f9a1e", "senet_fused cuda", "P"),
    "triton": ("#8b62b5", "senet_fused triton", "X"),
    "fused+compile": ("#3fb0a4", "senet_fused + torch.compile", "D"),
}
_OPS = {"se": "Squeeze-and-Excitation layers", "tail": "Block tails (BatchNorm, SE, + residual, ReLU)"}
_LINES = {"contiguous": "-", "channels_last": "--"}


def _figure(header: Row, rows: Sequence[Row], what: str) -> tuple[Any, list[Row], list[str], dict[Any, Any]]:
    """A figure with its title, the rows that it shows, their providers, and a panel for each of their groups.

    Of the cache modes it shows cold, if that was measured.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    caches = list(dict.fromkeys(row["cache"] for row in rows))
    cache = "cold" if "cold" in caches else caches[0]
    rows = [row for row in rows if row["cache"] == cache and row["provider"] != "copy"]
    providers = [name for name in STYLES if any(row["provider"] == name for row in rows)]
    groups = list(dict.fromkeys(map(group_of, rows)))
    columns = len({dtype for _, _, dtype in groups})
    lines = -(-len(groups) // columns)
    figure = Figure(figsize=(max(7, 5.5 * columns, 1.7 * len(providers)), 1.3 + 2.8 * lines), dpi=140)
    FigureCanvasAgg(figure)
    figure.set_layout_engine("constrained", rect=(0, 0, 1, 1 - 0.9 / figure.get_figheight()))
    panels = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axes in panels[len(groups) :]:
        axes.set_axis_off()
    for axes, group in zip(panels, groups, strict=False):
        axes.set_title(", ".join(group), loc="left", fontsize=9, fontweight="bold")
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=7)
        axes.grid(axis="y", color="#eeeeee", zorder=0)

    device, versions = header["device"], header["versions"]
    clock = "device time" if device.get("type") == "cuda" else f"{header['threads']} threads"
    facts = (device["name"], clock, f"torch {versions['torch']}", f"senet_fused {versions['senet_fused']}")
    ops = " and ".join(dict.fromkeys(_OPS[op_of(row)] for row in rows))
    top = figure.get_figheight()
    figure.text(0.01, 1 - 0.1 / top, f"{ops}: {what}", fontsize=11, fontweight="bold", va="top")
    text = ", ".join((*facts, f"{cache} cache", header["date"][:10]))
    figure.text(0.01, 1 - 0.36 / top, text, fontsize=8, color="#555555", va="top")
    return figure, rows, providers, dict(zip(groups, panels, strict=False))


def _save(figure: Any, handles: Sequence[Any], path: Path) -> None:
    place = {"loc": "upper left", "bbox_to_anchor": (0, 1 - 0.5 / figure.get_figheight())}
    figure.legend(handles=handles, ncols=len(handles), frameon=False, fontsize=8, handlelength=1.6, **place)
    figure.savefig(path)


def draw(header: Row, rows: Sequence[Row], path: Path) -> None:
    """Writes the picture of speed-ups over eager, a panel per group; its suffix is the format.

    On a GPU it shows the device time with a cold L2. A bar of height 1 is eager; without eager in the run, bars are the
    time in copies of the tensor.
    """
    from matplotlib.patches import Patch

    value, what = "speedup_vs_eager", "times faster than eager"
    if not any(row["provider"] == "eager" for row in rows):
        value, what = "copies", "time in copies of the tensor"
    figure, rows, providers, panels = _figure(header, rows, what)
    if value == "speedup_vs_eager" and len(providers) > 1:
        providers.remove("eager")
    width = 0.8 / len(providers)
    for group, members in grouped(rows, group_of).items():
        axes = panels[group]
        cells = {(row["layout"], row["shape"]): shape_label(row) for row in members}
        order = sorted(cells, key=lambda cell: list(_LINES).index(cell[0]))
        places = {cell: place for place, cell in enumerate(order)}
        for number, name in enumerate(providers):
            for row in (row for row in members if row["provider"] == name):
                x = places[row["layout"], row["shape"]] + (number - (len(providers) - 1) / 2) * width
                height = row[value] or 0.0
                axes.bar(x, height, 0.94 * width, color=STYLES[name][0], zorder=2)
                label = "error" if row["error"] else f"{height:.1f}" if height else "-"
                axes.text(x, height, f" {label}", ha="center", va="bottom", rotation=90, fontsize=6, zorder=3)
        axes.axhline(1, color=STYLES["eager"][0], lw=1.2, zorder=3)
        axes.margins(y=0.15)
        labels = [f"{cells[cell]}\n{cell[0]}" for cell in order]
        axes.set_xticks(range(len(order)), labels, rotation=90, fontsize=6)
        axes.set_ylabel(what, fontsize=8)
        means = {name: geometric_mean(row[value] for row in members if row["provider"] == name) for name in providers}
        text = ", ".join(f"{name} {mean:.2f}" for name, mean in means.items() if mean is not None)
        axes.set_xlabel(f"geometric means: {text}", fontsize=7, color="#555555")
    _save(figure, [Patch(color=STYLES[name][0], label=STYLES[name][1]) for name in providers], path)


def draw_roofline(header: Row, rows: Sequence[Row], path: Path) -> None:
    """Writes the picture of bandwidths, a panel per group: passes x bytes / median as a part of what a copy reached in
    the same run, by the tensor's size. On a GPU device time, with a cold L2."""
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FuncFormatter, NullFormatter, PercentFormatter

    figure, rows, providers, panels = _figure(header, rows, "bandwidth against a copy's")
    for group, members in grouped(rows, group_of).items():
        axes = panels[group]
        for number, name in enumerate(providers):
            beside = 1.05 ** (number - (len(providers) - 1) / 2)  # or equal values would hide each other
            for layout, style in _LINES.items():
                its = [row for row in members if (row["provider"], row["layout"]) == (name, layout)]
                points = [(tensor_bytes(row) * beside, row["fraction_of_copy"]) for row in its]
                points = sorted(point for point in points if point[1])
                if points:
                    colour, _, marker = STYLES[name]
                    face = colour if layout == "contiguous" else "white"
                    look = {"color": colour, "marker": marker, "markerfacecolor": face, "markersize": 5.5}
                    axes.plot(*zip(*points, strict=True), ls=style, lw=1, zorder=3, **look)
        axes.axhline(1, color="black", lw=1.2, zorder=2)
        axes.text(0.995, 1, "copy", ha="right", va="bottom", fontsize=8, transform=axes.get_yaxis_transform())
        axes.set_xscale("log")
        axes.set_ylim(0, 1.08 * max([1.0, *(row["fraction_of_copy"] for row in members if row["fraction_of_copy"])]))
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xticks(sorted({tensor_bytes(row) for row in members}))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda count, _: size_label(count)))
        passes = " or ".join(map(str, sorted({row["passes"] for row in members})))
        axes.set_title(f"{passes} passes x bytes / median", loc="right", fontsize=7, color="#555555")
    handles = [Line2D([], [], color=c, marker=marker, ls="", label=t) for c, t, marker in map(STYLES.get, providers)]
    handles += [Line2D([], [], color="#444444", ls=style, label=name) for name, style in _LINES.items()]
    _save(figure, handles, path)
