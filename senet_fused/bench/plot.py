"""Rows as a picture: how much faster than eager, and how far from the copy ceiling."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .report import geometric_mean

__all__ = ["draw"]

Row = dict[str, Any]
_COLOURS = {"eager": "#9a9a9a", "compile": "#e2902f", "fused": "#2268a8"}
_LABELS = {"eager": "eager", "compile": "torch.compile", "fused": "senet_fused"}
_MANY = 10  # cells from which on a panel's labels are turned and its figures small
_LAYOUTS = {"contiguous": "NCHW", "channels_last": "channels_last"}


def _cells(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """(layout, shape) in the order of a panel: layouts side by side, shapes within."""
    cells = dict.fromkeys((row["layout"], row["shape"]) for row in rows)
    layouts = list(dict.fromkeys(row["layout"] for row in rows))
    return sorted(cells, key=lambda cell: layouts.index(cell[0]))


def _panel(axes: Any, rows: Sequence[Row], value: str, providers: Sequence[str]) -> None:
    from matplotlib.patheffects import withStroke

    cells = _cells(rows)
    width = 0.8 / len(providers)
    found = {(row["layout"], row["shape"], row["provider"]): row for row in rows}
    top = max((row[value] for row in rows if row[value] and row["provider"] in providers), default=1.0)
    for number, provider in enumerate(providers):
        offset = (number - (len(providers) - 1) / 2) * width
        for place, cell in enumerate(cells):
            row = found.get((*cell, provider))
            if row is None:
                continue
            if row["error"]:
                axes.text(
                    place + offset,
                    0.02 * top,
                    "error",
                    rotation=90,
                    ha="center",
                    va="bottom",
                    fontsize=7,
                    color="#b00020",
                    path_effects=[withStroke(linewidth=2, foreground="white")],
                    zorder=4,
                )
                continue
            if row[value] is None:
                continue
            axes.bar(place + offset, row[value], width * 0.94, color=_COLOURS[provider], zorder=2)
            axes.text(
                place + offset,
                row[value] + 0.012 * top,
                f"{row[value]:.1f}" if row[value] < 100 else f"{row[value]:.0f}",
                ha="center",
                va="bottom",
                fontsize=7 if len(cells) <= _MANY else 5.5,
                color="#333333",
                path_effects=[withStroke(linewidth=2, foreground="white")],
                zorder=4,
            )

    crowded = len(cells) > _MANY
    ticks = []
    for _, shape in cells:
        n, c, r, *spatial = shape.split(",")
        ticks.append(f"{n}x{c}/{r}{' ' if crowded else chr(10)}@{'x'.join(spatial)}")
    axes.set_xticks(range(len(cells)), ticks, fontsize=7, rotation=90 if crowded else 0)
    axes.set_xlim(-0.6, len(cells) - 0.4)
    axes.set_ylim(0, top * 1.18)
    for place in range(1, len(cells)):
        if cells[place][0] != cells[place - 1][0]:
            axes.axvline(place - 0.5, color="#cccccc", lw=1, zorder=1)
    for layout in dict.fromkeys(cell[0] for cell in cells):
        places = [place for place, cell in enumerate(cells) if cell[0] == layout]
        axes.text(
            (places[0] + places[-1]) / 2,
            top * 1.17,
            _LAYOUTS[layout],
            ha="center",
            va="top",
            fontsize=8,
            color="#666666",
            style="italic",
        )
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="x", length=0)
    axes.tick_params(axis="y", labelsize=8)
    axes.grid(axis="y", color="#eeeeee", zorder=0)


def _means(rows: Sequence[Row], value: str, providers: Sequence[str]) -> str:
    means = {
        provider: geometric_mean(row[value] for row in rows if row["provider"] == provider and row[value])
        for provider in providers
    }
    return "geometric mean: " + ", ".join(
        f"{name} {mean:.2f}" for name, mean in means.items() if mean is not None
    )


def _group(row: Row) -> tuple[str, str, str]:
    return row["problem"], row["direction"], row["dtype"]


def draw(header: Row, rows: Sequence[Row], path: Path) -> None:
    """Writes the picture; its suffix is the format. On a GPU it shows the device time with a cold L2."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    caches = list(dict.fromkeys(row["cache"] for row in rows))
    cache = "cold" if "cold" in caches else caches[0]
    rows = [row for row in rows if row["cache"] == cache]
    groups = list(dict.fromkeys(map(_group, rows)))
    providers = [name for name in _COLOURS if any(row["provider"] == name for row in rows)]
    against_eager = [name for name in providers if name != "eager"] if "eager" in providers else []
    columns = [
        column
        for column in (
            ("speedup_vs_eager", against_eager, "times faster than eager"),
            ("copies", providers, "time in copies of the tensor"),
        )
        if column[1]
    ]
    most = max(len(_cells([row for row in rows if _group(row) == group])) for group in groups)
    panel_width = max(6.0, min(0.85 * most, 12))
    panel_height = 2.7 if most <= _MANY else 3.4
    head = 0.95  # inches for the title and the legend
    height = head + panel_height * len(groups)
    figure = Figure(figsize=(panel_width * len(columns), height), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(rect=(0, 0, 1, 1 - head / height), h_pad=0.08, w_pad=0.08)
    grid = figure.subplots(len(groups), len(columns), squeeze=False)
    several = len({problem for problem, _, _ in groups}) > 1
    for line, group in zip(grid, groups, strict=True):
        members = [row for row in rows if _group(row) == group]
        title = ", ".join(group if several else group[1:])
        for axes, (value, names, label) in zip(line, columns, strict=True):
            _panel(axes, members, value, names)
            axes.set_ylabel(label, fontsize=8)
            axes.set_title(title, loc="left", fontsize=9, fontweight="bold")
            axes.set_title(_means(members, value, names), loc="right", fontsize=7, color="#555555")
            if value == "speedup_vs_eager":
                axes.axhline(1, color=_COLOURS["eager"], lw=1.2, zorder=3)
            else:
                floors = {row["passes"] / 2 for row in members if row["provider"] != "copy"}
                for floor in floors:
                    axes.axhline(floor, color="black", lw=1, ls=(0, (4, 3)), zorder=3)

    handles = [Patch(color=_COLOURS[name], label=_LABELS[name]) for name in providers]
    handles.append(
        figure.axes[-1].plot(
            [], [], color="black", lw=1, ls=(0, (4, 3)), label="least traffic at copy's speed"
        )[0]
    )
    problems = ", ".join(dict.fromkeys(row["problem"] for row in rows))
    device, versions = header["device"], header["versions"]
    top = 1 - 0.12 / height
    figure.text(
        0.012, top, f"Squeeze-and-Excitation layers: {problems}", fontsize=12, fontweight="bold", va="top"
    )
    figure.text(
        0.012,
        1 - 0.38 / height,
        f"{device['name']}, {header['threads']} threads, torch {versions['torch']}, senet_fused "
        f"{versions['senet_fused']}, {cache} cache, {header['date'][:10]}",
        fontsize=8,
        color="#555555",
        va="top",
    )
    figure.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(0.006, 1 - 0.56 / height),
        ncols=len(handles),
        frameon=False,
        fontsize=8,
        handlelength=1.6,
    )
    figure.savefig(path)
