"""The variants of a network: stock, its twin without SE, fused, tails, and folded for inference, as they are, compiled,
or a CUDA graph."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from senet_fused import fold_batchnorm, fuse, fuse_report

from .providers import under_compile
from .zoo import settle

__all__ = ["FOLDED", "ModelCase", "Network", "NoVariant", "Variant", "twin"]

FOLDED = ("folded", "folded+fused")


@dataclasses.dataclass(frozen=True)
class ModelCase:
    """One cell of the measurement, under the names that the progress display asks for.

    batch: "max" until it is known. largest: that it is the largest that fits.
    """

    problem: str
    size: tuple[int, ...]
    batch: int | str
    dtype: str
    amp: bool
    layout: str
    direction: str
    largest: bool = False

    @property
    def label(self) -> str:
        return f"{self.batch} x {'x'.join(map(str, self.size))}{' amp' if self.amp else ''}"

    @property
    def memory_format(self) -> torch.memory_format:
        if self.layout == "contiguous":
            return torch.contiguous_format
        return torch.channels_last if len(self.size) == 3 else torch.channels_last_3d

    @property
    def training(self) -> bool:
        return self.direction == "training"


class NoVariant(Exception):
    """A network has no such variant; the message says why. That is a note in its row, no error."""


@dataclasses.dataclass
class Variant:
    """One variant on its way through one case: built, checked, timed. What is called is the model, compiled if need be;
    a CUDA graph is made of such calls.

    reference: whom it is compared with. fused: how many SE layers are. blocks, tails: the blocks around SE layers, and
    how many of them run with tails. folded: how many convolutions have a BatchNorm in them. joined: how many SE layers
    run with their shortcut's addition and ReLU.
    """

    name: str
    model: nn.Module | None = None
    call: Callable[[Tensor], Any] | None = None
    require_a_graph: Callable[[], None] = lambda: None
    fused: int = 0
    blocks: int | None = None
    tails: int = 0
    folded: int = 0
    joined: int = 0
    backend: str | None = None
    output_error: float | None = None
    gradient_error: float | None = None
    statistics_error: float | None = None
    saved_bytes: int | None = None
    peak_bytes: int | None = None
    note: str | None = None
    error: str | None = None

    @property
    def compiled(self) -> bool:
        return self.name == "max-autotune" or self.name.endswith("compile")

    @property
    def graphed(self) -> bool:
        """Whether what is called is a CUDA graph of ours."""
        return self.name.endswith("graph")

    @property
    def prototype(self) -> str:
        name, _, how = self.name.rpartition("+")
        return (name or "stock") if how in ("compile", "max-autotune", "graph") else self.name

    @property
    def reference(self) -> str:
        return "no-se" if self.prototype == "no-se" else "stock"

    def remark(self, text: str) -> None:
        self.note = text if self.note is None else f"{self.note}; {text}"


def twin(model: nn.Module) -> nn.Module:
    """A copy with nn.Identity for every SE layer. Raises NoVariant where that is not the network without SE."""
    layers = fuse_report(model).layers
    if not layers:
        raise NoVariant("no twin: the network has no SE layer")
    for layer in layers:
        if layer.name == "":
            raise NoVariant("no twin: the network itself is the SE layer")
        if layer.form is None:
            raise NoVariant(f"no twin: what {layer.name} ({layer.kind}) returns is not known: {layer.reason}")
        if layer.form not in ("scale", "residual"):
            raise NoVariant(f"no twin: {layer.name} ({layer.kind}) returns its gate, not its scaled input")
    model = copy.deepcopy(model)
    without = {model.get_submodule(layer.name) for layer in layers}
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if child in without:
                module._modules[name] = nn.Identity()
    return model


def _require_layers(model: nn.Module) -> None:
    """Raises NoVariant where no layer is one that fuse is for."""
    layers = fuse_report(model).layers
    if not layers:
        raise NoVariant("nothing to fuse: the network has no SE layer")
    if all(layer.form is None for layer in layers):
        raise NoVariant(f"nothing to fuse: {layers[0].name or 'the network'} ({layers[0].kind}): {layers[0].reason}")


def _fused(model: nn.Module, backend: str | None, tails: bool = False) -> nn.Module:
    """A copy after fuse. Raises NoVariant where no layer is one that fuse is for."""
    _require_layers(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of nothing fused: the variant has a note, or an error
        return fuse(copy.deepcopy(model), backend=backend, tails=tails)


def _folded(model: nn.Module, backend: str | None, fused: bool) -> nn.Module:
    """A copy after fold_batchnorm. Raises NoVariant where there is nothing to fold, or to fuse if that is asked for."""
    if fused:
        _require_layers(model)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            folded = fold_batchnorm(model, fuse=fused, backend=backend)
    except ValueError as error:  # most of all that it cannot be traced
        raise NoVariant(f"not folded: {error}") from error
    if not folded.folding.folded:
        left = folded.folding.left
        why = f"{left[0][0]}: {left[0][1]}" if left else "the network has no BatchNorm"
        raise NoVariant(f"nothing to fold: {why}")
    return folded


class Network:
    """One network on its device, and what its variants are copies of: stock, no-se, fused, tails, and the folded."""

    def __init__(self, stock: nn.Module, size: tuple[int, ...], device: str, backend: str | None, seed: int) -> None:
        self.layers = len(fuse_report(stock).layers)
        self._prototypes: dict[str, nn.Module | Exception] = {}
        try:
            self._prototypes["no-se"] = twin(stock).to(device)
            settle(self._prototypes["no-se"], size, seed)
        except Exception as error:
            self._prototypes["no-se"] = error
        self._prototypes["stock"] = stock.to(device)
        settle(stock, size, seed)
        self._backend = backend

    def _prototype(self, name: str) -> nn.Module | Exception:
        if name not in self._prototypes:  # proofs take seconds: made for those who ask
            try:
                self._prototypes[name] = self._make(name)
            except Exception as error:
                self._prototypes[name] = error
        return self._prototypes[name]

    def _make(self, name: str) -> nn.Module:
        stock = self._prototypes["stock"]
        if name in FOLDED:
            return _folded(stock, self._backend, fused=name == "folded+fused")
        return _fused(stock, self._backend, tails=name == "tails")

    def build(self, variant: Variant, case: ModelCase) -> None:
        """Gives the variant a fresh copy for one case. Raises NoVariant, or why it cannot be made."""
        if variant.prototype in FOLDED and case.training:
            raise NoVariant("for inference only: its BatchNorms are folded into the convolutions")
        found = self._prototype(variant.prototype)
        if isinstance(found, Exception):
            raise found
        model = copy.deepcopy(found)
        if not case.amp:
            model.to(getattr(torch, case.dtype))
        model.to(memory_format=case.memory_format).train(case.training)
        if variant.prototype in FOLDED:
            _count_folded(variant, model)
        if variant.prototype in ("fused", "tails", "folded+fused"):
            _count_fused(variant, model)
        variant.model = variant.call = model
        if variant.compiled:
            # Not as one graph: a network may have breaks of its own.
            mode = "max-autotune" if variant.name == "max-autotune" else None
            variant.call, variant.require_a_graph = under_compile(model, mode, fullgraph=False)


def _count_folded(variant: Variant, model: nn.Module) -> None:
    """Notes how many convolutions have a BatchNorm in them, how many SE layers are joined, and what is left."""
    names, left, joined = model.folding
    variant.folded, variant.joined = len(names), len(joined)
    if left:
        variant.remark(f"{len(left)} BatchNorms are not folded; {left[0][0]} is not: {left[0][1]}")


def _count_fused(variant: Variant, model: nn.Module) -> None:
    """Notes how many layers are fused and how many blocks run with tails, and if not all why.

    Raises NoVariant if no block of tails does, RuntimeError if no layer is fused.
    """
    tails = variant.prototype == "tails"
    report = fuse_report(model, tails=tails)
    about_blocks = None
    if tails:
        if not report.blocks:
            raise NoVariant("no tails: there is no block around an SE layer")
        variant.blocks = len(report.blocks)
        variant.tails, about_blocks = _counted(report.blocks, "blocks run with tails", "does")
        if not variant.tails:
            raise NoVariant(f"no tails: {about_blocks}")
    variant.fused, about_layers = _counted(report.layers, "SE layers fused", "is")
    if not variant.fused:
        raise RuntimeError(about_layers)
    for text in filter(None, (about_layers, about_blocks)):
        variant.remark(text)


def _counted(found: Sequence[Any], what: str, verb: str) -> tuple[int, str | None]:
    """How many rows of a report are fused; unless all are, that as text, with why the first of the others is not."""
    left = [one for one in found if not one.fused]
    count = len(found) - len(left)
    if not left:
        return count, None
    first = f"{left[0].name or 'the network'} {verb} not: {left[0].reason}"
    return count, f"{count} of {len(found)} {what}; {first}"
