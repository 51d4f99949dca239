"""Rows as pictures: how much faster than eager and how far from the copy ceiling; and the bandwidth by size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .report import geometric_mean, group_of, op_of, size_label, tensor_bytes

__all__ = ["draw", "draw_roofline"]

Row = dict[str, Any]
_COLOURS = {
    "eager": "#9a9a9a",
    "compile": "#e2902f",
    "max-autotune": "#a8481f",
    "fused": "#2268a8",
    "cuda": "#6f9a1e",
    "triton": "#8b62b5",
    "fused+compile": "#3fb0a4",
}
_LABELS = {
    "eager": "eager",
    "compile": "torch.compile",
    "max-autotune": "torch.compile max-autotune",
    "fused": "senet_fused",
    "cuda": "senet_fused cuda",
    "triton": "senet_fused triton",
    "fused+compile": "senet_fused + torch.compile",
}
_MARKERS = {
    "eager": "s",
    "compile": "^",
    "max-autotune": "v",
    "fused": "o",
    "cuda": "P",
    "triton": "X",
    "fused+compile": "D",
}
_OPS = {"se": "Squeeze-and-Excitation layers", "tail": "Block tails (BatchNorm, SE, + residual, ReLU)"}
_RIVALS = ("eager", "compile", "max-autotune")  # drawn behind what is ours
_LINES = {"contiguous": "-", "channels_last": (0, (3, 2))}
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
                rotation=90 if len(providers) > 3 else 0,
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
    return "geometric mean: " + ", ".join(f"{name} {mean:.2f}" for name, mean in means.items() if mean is not None)


def _ops(rows: Sequence[Row]) -> str:
    return " and ".join(dict.fromkeys(_OPS[op_of(row)] for row in rows))


def _cold(rows: Sequence[Row]) -> tuple[str, list[Row]]:
    """The cache mode that is drawn, cold if it was measured, and its rows."""
    caches = list(dict.fromkeys(row["cache"] for row in rows))
    cache = "cold" if "cold" in caches else caches[0]
    return cache, [row for row in rows if row["cache"] == cache]


def _figure(width: float, panel_height: float, lines: int, columns: int, head: float) -> tuple[Any, Any, float]:
    """(figure, its panels, its height), with `head` inches left free above."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    height = head + panel_height * lines
    figure = Figure(figsize=(width, height), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(rect=(0, 0, 1, 1 - head / height), h_pad=0.08, w_pad=0.08)
    return figure, figure.subplots(lines, columns, squeeze=False), height


def _heading(figure: Any, height: float, title: str, header: Row, cache: str, legends: Sequence[Sequence[Any]]) -> None:
    """Title, what it was measured on, and lines of legend."""
    device, versions = header["device"], header["versions"]
    time = "device time" if device.get("type") == "cuda" else f"{header['threads']} threads"
    parts = (
        device["name"], time, f"torch {versions['torch']}", f"senet_fused {versions['senet_fused']}", f"{cache} cache",
        header["date"][:10],
    )  # fmt: skip
    figure.text(0.012, 1 - 0.12 / height, title, fontsize=12, fontweight="bold", va="top")
    figure.text(0.012, 1 - 0.38 / height, ", ".join(parts), fontsize=8, color="#555555", va="top")
    for number, handles in enumerate(legends):
        figure.legend(
            handles=handles,
            loc="upper left",
            bbox_to_anchor=(0.006, 1 - (0.56 + 0.22 * number) / height),
            ncols=len(handles),
            frameon=False,
            fontsize=8,
            handlelength=1.6,
        )


def draw(header: Row, rows: Sequence[Row], path: Path) -> None:
    """Writes the picture; its suffix is the format. On a GPU it shows the device time with a cold L2."""
    from matplotlib.patches import Patch

    cache, rows = _cold(rows)
    groups = list(dict.fromkeys(map(group_of, rows)))
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
    most = max(len(_cells([row for row in rows if group_of(row) == group])) for group in groups)
    # Wide enough for a panel's two titles, and together for the line of the legend.
    roomy = 6.0 if len(providers) <= 3 else 8.4 if len(providers) <= 5 else 9.6
    width = max(max(roomy, min(0.85 * most, 12)) * len(columns), 1.8 * (len(providers) + 1))
    head = 0.95  # inches for the title and the legend
    figure, grid, height = _figure(width, 2.7 if most <= _MANY else 3.4, len(groups), len(columns), head)
    several = len({problem for problem, _, _ in groups}) > 1
    for line, group in zip(grid, groups, strict=True):
        members = [row for row in rows if group_of(row) == group]
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
        figure.axes[-1].plot([], [], color="black", lw=1, ls=(0, (4, 3)), label="least traffic at copy's speed")[0]
    )
    problems = ", ".join(dict.fromkeys(row["problem"] for row in rows))
    _heading(figure, height, f"{_ops(rows)}: {problems}", header, cache, [handles])
    figure.savefig(path)


def _roofline_panel(
    axes: Any, rows: Sequence[Row], providers: Sequence[str], layouts: Sequence[str], top: float
) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator, PercentFormatter

    shapes = dict.fromkeys(row["shape"] for row in rows)
    places = {row["shape"]: tensor_bytes(row) for row in rows}
    # Side by side within a size, or they would hide each other.
    apart = 1.05
    for number, provider in enumerate(providers):
        shift = apart ** (number - (len(providers) - 1) / 2)
        for layout in layouts:
            found = [row for row in rows if (row["provider"], row["layout"]) == (provider, layout)]
            measured = [
                (places[row["shape"]] * shift, row["fraction_of_copy"]) for row in found if row["fraction_of_copy"]
            ]
            if not measured:
                continue
            axes.plot(
                *zip(*sorted(measured), strict=True),
                color=_COLOURS[provider],
                marker=_MARKERS[provider],
                markersize=5.5,
                markerfacecolor=_COLOURS[provider] if layout == "contiguous" else "white",
                markeredgewidth=1.2,
                lw=1 if len(shapes) <= _MANY else 0,
                ls=_LINES[layout],
                zorder=3 if provider in _RIVALS else 4,
            )
    axes.set_xscale("log")
    sizes = sorted(set(places.values()))
    axes.set_xlim(sizes[0] / 1.6, sizes[-1] * 1.6)
    axes.axhline(1, color="black", lw=1.2, zorder=2)
    axes.text(0.995, 1, "copy", ha="right", va="bottom", fontsize=8, transform=axes.get_yaxis_transform())
    axes.set_ylim(0, top)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.xaxis.set_minor_locator(NullLocator())
    if len(sizes) <= 6 and len(sizes) == len(shapes):
        names = {}
        for shape, place in places.items():
            _, c, r, *spatial = shape.split(",")
            names[place] = f"{size_label(place)}\n{c}/{r} @{'x'.join(spatial)}"
        axes.xaxis.set_major_locator(FixedLocator(sizes))
        axes.set_xticklabels([names[size] for size in sizes])
    else:
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda count, _: size_label(count)))
    axes.tick_params(labelsize=8)
    axes.tick_params(axis="x", labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#eeeeee", zorder=0)


def draw_roofline(header: Row, rows: Sequence[Row], path: Path) -> None:
    """Writes the picture of bandwidths: passes x bytes / median as a part of what the copy reached in the same run,
    by the tensor's size; a panel per direction and dtype. On a GPU device time, with a cold L2."""
    from matplotlib.lines import Line2D

    cache, rows = _cold(rows)
    rows = [row for row in rows if row["provider"] != "copy"]
    providers = [name for name in _COLOURS if any(row["provider"] == name for row in rows)]
    layouts = [name for name in _LAYOUTS if any(row["layout"] == name for row in rows)]
    problems, directions, dtypes = (list(dict.fromkeys(values)) for values in zip(*map(group_of, rows), strict=True))
    lines = [(problem, direction) for problem in problems for direction in directions]
    top = 1.08 * max([1.0, *(row["fraction_of_copy"] for row in rows if row["fraction_of_copy"])])
    width = max(9.5, 1.6 * len(providers), 5.4 * len(dtypes))
    figure, grid, height = _figure(width, 3.0, len(lines), len(dtypes), 1.12)
    for line, (problem, direction) in zip(grid, lines, strict=True):
        for axes, dtype in zip(line, dtypes, strict=True):
            members = [row for row in rows if group_of(row) == (problem, direction, dtype)]
            if not members:
                axes.set_axis_off()
                continue
            _roofline_panel(axes, members, providers, layouts, top)
            axes.set_ylabel("of the copy's bandwidth", fontsize=8)
            title = (problem, direction, dtype) if len(problems) > 1 else (direction, dtype)
            axes.set_title(", ".join(title), loc="left", fontsize=9, fontweight="bold")
            passes = " or ".join(str(count) for count in sorted({row["passes"] for row in members}))
            axes.set_title(f"{passes} passes x bytes / median", loc="right", fontsize=7, color="#555555")
    for axes in grid[-1]:
        axes.set_xlabel("the tensor's size", fontsize=8)

    who = [
        Line2D([], [], color=_COLOURS[name], marker=_MARKERS[name], ls="", label=_LABELS[name]) for name in providers
    ]
    how = [
        Line2D(
            [], [], color="#444444", marker="o", ls=_LINES[name], lw=1, label=_LAYOUTS[name],
            markerfacecolor="#444444" if name == "contiguous" else "white",
        )
        for name in layouts
    ]  # fmt: skip
    batches = ", ".join(dict.fromkeys(row["shape"].split(",")[0] for row in rows))
    title = f"{_ops(rows)} against a copy: {', '.join(problems)}, batch {batches}"
    _heading(figure, height, title, header, cache, [who, how])
    figure.savefig(path)
