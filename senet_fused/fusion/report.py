"""What fuse has done, or would do, to every SE layer of a model: a table to read and to go through."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

__all__ = ["FuseReport", "LayerReport"]


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """One SE layer, or one that looks like it.

    name: its path in the model, "" for the model itself. kind: its family in words. form: what it returns, "scale" (x *
    gate), "residual" (x * gate + x), "gate" or "flat_gate" (the gate, [N, C, 1, ...] or [N, C]); None if it is not
    understood. channels, rd_channels: C and R, None likewise. status: "fused"; "original runs" (fused, but something
    about it makes the original forward run at present); "cannot run" (the backend asked for by name cannot serve it);
    "can be fused"; "left". reason: why.
    """

    name: str
    kind: str
    form: str | None
    channels: int | None
    rd_channels: int | None
    status: str
    reason: str

    @property
    def fused(self) -> bool:
        """Whether the fused operator serves the layer."""
        return self.status == "fused"


@dataclasses.dataclass(frozen=True)
class FuseReport:
    """The SE layers of a model in the order of ``named_modules``; ``print`` it, iterate over it, or take ``layers``."""

    model: str
    layers: tuple[LayerReport, ...]

    def __iter__(self) -> Iterator[LayerReport]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def count(self, status: str) -> int:
        """How many layers have this status."""
        return sum(layer.status == status for layer in self.layers)

    @property
    def summary(self) -> str:
        """One line: how many of which status."""
        if not self.layers:
            return f"{self.model}: no SE layers found"
        counts = {layer.status: self.count(layer.status) for layer in self.layers}
        what = ", ".join(f"{count} {status}" for status, count in counts.items())
        return f"{self.model}: {len(self.layers)} SE layer{'s' * (len(self.layers) != 1)}: {what}"

    def __str__(self) -> str:
        if not self.layers:
            return self.summary
        rows = [("layer", "kind", "C", "R", "status", "why")]
        for layer in self.layers:
            sizes = ("-" if size is None else str(size) for size in (layer.channels, layer.rd_channels))
            rows.append((layer.name or "(the model)", layer.kind, *sizes, layer.status, layer.reason))
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        lines = []
        for row in rows:
            cells = (cell.rjust(w) if i in (2, 3) else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths)))  # noqa: B905
            lines.append("  ".join((*cells, row[5])).rstrip())
        return "\n".join((lines[0], "  ".join("-" * w for w in (*widths, 3)), *lines[1:], "", self.summary))
