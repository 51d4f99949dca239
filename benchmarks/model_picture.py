"""Draws runs of `senet-fused bench model --json` as bars: python benchmarks/model_picture.py OUT.png FILE.json ...

One panel per model and dtype; a bar is the median time of a step, its whisker half the interquartile range.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

BARS = {  # provider: label, colour
    "stock": ("stock PyTorch", "#9a9a9a"),
    "compile": ("torch.compile", "#e2902f"),
    "fused": ("fuse(model)", "#7fb2dd"),
    "tails": ("fuse(model, tails=True)", "#2268a8"),
    "tails+compile": ("the same + torch.compile", "#3fb0a4"),
    "no-se": ("stock, SE layers removed", "#dddddd"),
}


def panel(axes: Any, rows: list[dict[str, Any]]) -> None:
    rows = [row for row in rows if row["provider"] in BARS]
    for place, row in enumerate(rows):
        label, colour = BARS[row["provider"]]
        median, spread = 1e3 * row["median_s"], 1e3 * row["iqr_s"] / 2
        axes.barh(place, median, xerr=spread, color=colour, error_kw={"ecolor": "#555555", "capsize": 2, "lw": 0.8})
        text = f"{median:.0f} ms" + ("" if row["provider"] == "stock" else f", {row['speedup_vs_stock']:.2f}x")
        axes.text(median + spread, place, "  " + text, va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), [BARS[row["provider"]][0] for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.45e3 * max(row["median_s"] for row in rows))
    first = rows[0]
    dtype = f"{first['dtype']} autocast" if first["amp"] else first["dtype"]
    axes.set_title(f"{first['model']}, batch {first['batch']}, {dtype}", loc="left", fontsize=9, fontweight="bold")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="x", labelsize=7)


def draw(out: Path, files: list[Path]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    runs = [json.loads(file.read_text()) for file in files]
    figure, grid = pyplot.subplots(
        (len(runs) + 1) // 2, 2, figsize=(10.8, 0.6 + 2.0 * ((len(runs) + 1) // 2)), squeeze=False
    )
    for axes in grid.flat[len(runs) :]:
        axes.set_axis_off()
    for axes, run in zip(grid.flat, runs, strict=False):
        panel(axes, run["rows"])
    header = runs[0]["header"]
    first = runs[0]["rows"][0]
    figure.suptitle(
        f"Time of a {first['mode']} step, {first['layout']}; {header['device']['name']}, {header['threads']} threads, "
        f"torch {header['versions']['torch']}. Whiskers: half the interquartile range.",
        fontsize=8, x=0.01, ha="left",
    )  # fmt: skip
    figure.tight_layout(w_pad=2.5)
    figure.savefig(out, dpi=80)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    draw(Path(sys.argv[1]), [Path(name) for name in sys.argv[2:]])
