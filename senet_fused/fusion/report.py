"""What fuse has done, or would do, to every SE layer of a model: a table to read and to go through."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator

from torch import nn

from .. import select
from ..modules import FusedSE
from .blocks import KNOWN_BLOCKS, FusedBlock, block_alteration
from .find import Found
from .layer import alteration, is_fused, is_slower
from .recipe import GATE_FORMS

__all__ = ["BlockReport", "FuseReport", "LayerReport", "block_report", "layer_report"]


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """One SE layer, or one that looks like it.

    name: its path in the model, "" for the model itself. kind: its family in words. form: what it returns, "scale" (x *
    gate), "residual" (x * gate + x), "gate" or "flat_gate" (the gate, [N, C, 1, ...] or [N, C]); None if it is not
    understood. channels, rd_channels: C and R, None likewise. status: "fused"; "original runs" (fused, but something
    about it makes the original forward run at present, or makes FusedSE call its children); "cannot run" (the backend
    asked for by name cannot serve it); "can be fused"; "left". reason: why.
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
class BlockReport:
    """A block with an SE layer in it.

    name: its path in the model, "" for the model itself. kind: its form, or its class. norms: how many of its
    BatchNorms run as tails. status: as of LayerReport. reason: why.
    """

    name: str
    kind: str
    norms: int
    status: str
    reason: str

    @property
    def fused(self) -> bool:
        """Whether the block's BatchNorms run as tails."""
        return self.status == "fused"


@dataclasses.dataclass(frozen=True)
class FuseReport:
    """The SE layers of a model in the order of ``named_modules``; ``print`` it, iterate over it, or take ``layers``.

    blocks: those around the SE layers, where tails have been looked at.
    """

    model: str
    layers: tuple[LayerReport, ...]
    blocks: tuple[BlockReport, ...] = ()

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
        text = f"{self.model}: {_counted('SE layer', self.layers)}"
        return f"{text}; {_counted('block', self.blocks)}" if self.blocks else text

    def __str__(self) -> str:
        if not self.layers:
            return self.summary
        rows = [("layer", "kind", "C", "R", "status", "why")]
        for layer in self.layers:
            sizes = ("-" if size is None else str(size) for size in (layer.channels, layer.rd_channels))
            rows.append((layer.name or _ITSELF, layer.kind, *sizes, layer.status, layer.reason))
        lines = _table(rows, (2, 3))
        if self.blocks:
            rows = [("block", "kind", "norms", "status", "why")]
            rows += [(b.name or _ITSELF, b.kind, str(b.norms), b.status, b.reason) for b in self.blocks]
            lines += ["", *_table(rows, (2,))]
        return "\n".join((*lines, "", self.summary))


_ITSELF = "(the model)"


def _counted(what: str, found: tuple[LayerReport, ...] | tuple[BlockReport, ...]) -> str:
    counts = collections.Counter(one.status for one in found)
    each = ", ".join(f"{count} {status}" for status, count in counts.items())
    return f"{len(found)} {what}{'s' * (len(found) != 1)}: {each}"


def _table(rows: list[tuple[str, ...]], right: tuple[int, ...]) -> list[str]:
    """Columns side by side, those in right with their right ends in line; the last one as it is."""
    last = len(rows[0]) - 1
    widths = [max(len(row[i]) for row in rows) for i in range(last)]
    lines = []
    for row in rows:
        cells = (row[i].rjust(w) if i in right else row[i].ljust(w) for i, w in enumerate(widths))
        lines.append("  ".join((*cells, row[last])).rstrip())
    return [lines[0], "  ".join("-" * w for w in (*widths, 3)), *lines[1:]]


_REPLACED = "its forward has been replaced on the object, and that runs"
_GATE_ON_A_CPU = "a gate alone, which PyTorch's own operators make faster on a CPU; backend='cpu' has the kernels run"
_SERVED = {
    "scale": "the whole layer",
    "residual": "the whole layer, with its addition of the input",
    "gate": "the gate; the multiplication is its caller's and stays there",
    "flat_gate": "the gate; the multiplication is its caller's and stays there",
}
_TAILS = "every BatchNorm as a tail"


def layer_report(found: Found) -> LayerReport:
    """The present state of an SE layer."""
    layer, recipe = found.module, found.how
    if isinstance(recipe, str):
        return LayerReport(found.name, found.kind, None, None, None, "left", recipe)
    if isinstance(layer, FusedSE):
        sizes = ("scale", layer.channels, layer.rd_channels)
        return LayerReport(found.name, found.kind, *sizes, *_status_of_ours(layer))
    state = ("can be fused", _SERVED[recipe.form])
    if is_fused(layer):
        state = _status(layer, alteration(layer), _SERVED[recipe.form], gate=recipe.form in GATE_FORMS)
    return LayerReport(found.name, found.kind, recipe.form, recipe.channels, recipe.rd_channels, *state)


def block_report(found: Found) -> BlockReport:
    """The present state of a block around an SE layer."""
    block, status, reason = found.module, "can be fused", _TAILS
    if isinstance(found.how, str):
        status, reason = "left", found.how
    elif isinstance(block, FusedBlock):
        status, reason = _status(block, block_alteration(block), _TAILS)
    norms = len(KNOWN_BLOCKS[found.kind].norms) if status in ("can be fused", "fused") else 0
    return BlockReport(found.name, found.kind, norms, status, reason)


def _status_of_ours(layer: FusedSE) -> tuple[str, str]:
    if "forward" in vars(layer):
        return "original runs", _REPLACED
    if isinstance(altered := layer._weights(), str):
        return "original runs", f"its children are called: {altered}"
    return "fused", "a layer of this package"


def _status(module: nn.Module, altered: str | None, served: str, *, gate: bool = False) -> tuple[str, str]:
    """The status of a module that fuse has converted, and why; altered: why its original runs for any input."""
    if "forward" in vars(module):
        return "original runs", _REPLACED
    if altered is not None:
        return "original runs", altered
    weight, fusion = next(module.parameters()), module._senet_fused
    served += "" if fusion.verified else "; not verified"
    if weight.device.type == "meta":
        return "fused", served
    try:
        backend, reason = select.choose(fusion.backend, weight.device.type, weight.dtype)
    except select.BackendUnavailableError as error:
        return "cannot run", str(error)
    if backend == "reference" and select.requested(fusion.backend)[0] == "auto":
        return "original runs", f"no kernels: {reason}"
    if gate and is_slower(fusion.backend, weight.device.type):
        return "original runs", _GATE_ON_A_CPU
    return "fused", f"{served}; backend {backend}"
