"""The variants of a network: stock, without SE, fused, tails, folded; each as it is, compiled, or a CUDA graph."""

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

__all__ = ["ModelCase", "Network", "NoVariant", "Variant", "without_se"]

_FOLDED = ("folded", "folded+fused")


@dataclasses.dataclass(frozen=True)
class ModelCase:
    """One cell of the measurement, under the names that the progress display asks for.

    batch: "max" until it is known. largest: whether it is the largest that fits.
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
    """A network has no such variant; the message says why. A note in its row, not an error."""


@dataclasses.dataclass
class Variant:
    """One variant on its way through one case: built, checked, timed.

    model: its network; call: what is called, the model or what torch.compile made of it. The other fields are columns
    of its row. se_fused: how many SE layers are fused. se_blocks, se_tails: the blocks around SE layers, and how many
    of them run with tails. norms_folded: how many BatchNorms are in the convolution in front. se_joined: how many SE
    layers run with their shortcut's addition and ReLU.
    """

    name: str
    model: nn.Module | None = None
    call: Callable[[Tensor], Any] | None = None
    require_a_graph: Callable[[], None] = lambda: None
    backend: str | None = None
    output_error: float | None = None
    gradient_error: float | None = None
    statistics_error: float | None = None
    saved_bytes: int | None = None
    peak_bytes: int | None = None
    se_fused: int = 0
    se_blocks: int | None = None
    se_tails: int = 0
    se_joined: int = 0
    norms_folded: int = 0
    note: str | None = None
    error: str | None = None

    @property
    def compiled(self) -> bool:
        return self.name == "max-autotune" or self.name.endswith("compile")

    @property
    def graphed(self) -> bool:
        """Whether what is timed is a CUDA graph made here."""
        return self.name.endswith("graph")

    @property
    def prototype(self) -> str:
        """Whose network it has: stock, no-se, fused, tails, folded or folded+fused."""
        name, _, how = self.name.rpartition("+")
        return (name or "stock") if how in ("compile", "max-autotune", "graph") else self.name

    @property
    def reference(self) -> str:
        """The variant that it is compared with."""
        return "no-se" if self.prototype == "no-se" else "stock"

    def remark(self, text: str) -> None:
        self.note = text if self.note is None else f"{self.note}; {text}"


def without_se(model: nn.Module) -> nn.Module:
    """A copy with nn.Identity for every SE layer. Raises NoVariant where that is not the network without SE."""
    layers = fuse_report(model).layers
    if not layers:
        raise NoVariant("not made: the network has no SE layer")
    for layer in layers:
        if layer.name == "":
            raise NoVariant("not made: the network itself is the SE layer")
        if layer.form is None:
            raise NoVariant(f"not made: what {layer.name} ({layer.kind}) returns is not known: {layer.reason}")
        if layer.form not in ("scale", "residual"):
            raise NoVariant(f"not made: {layer.name} ({layer.kind}) returns its gate, not its scaled input")
    model = copy.deepcopy(model)
    removed = {model.get_submodule(layer.name) for layer in layers}
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if child in removed:
                module._modules[name] = nn.Identity()
    return model


def _fusible(model: nn.Module) -> nn.Module:
    """The model. Raises NoVariant where fuse has nothing to do."""
    layers = fuse_report(model).layers
    if not layers:
        raise NoVariant("nothing to fuse: the network has no SE layer")
    if all(layer.form is None for layer in layers):
        raise NoVariant(f"nothing to fuse: {layers[0].name or 'the network'} ({layers[0].kind}): {layers[0].reason}")
    return model


def _folded(model: nn.Module, backend: str | None, fused: bool) -> nn.Module:
    """A copy after fold_batchnorm. Raises NoVariant where there is nothing to fold."""
    try:
        folded = fold_batchnorm(model, fuse=fused, backend=backend)
    except ValueError as error:  # it cannot be traced, for instance
        raise NoVariant(f"not folded: {error}") from error
    if not folded.folding.folded:
        left = folded.folding.left
        why = f"{left[0][0]}: {left[0][1]}" if left else "the network has no BatchNorm"
        raise NoVariant(f"nothing to fold: {why}")
    return folded


class Network:
    """One network on its device, and the prototypes that its variants are copies of.

    Args:
        stock: changed, as :func:`~senet_fused.bench.zoo.settle` does.
        backend: for fuse and fold_batchnorm.
    """

    def __init__(self, stock: nn.Module, size: tuple[int, ...], device: str, backend: str | None, seed: int) -> None:
        self.layers = len(fuse_report(stock).layers)
        self._backend = backend
        self._prototypes: dict[str, nn.Module | Exception] = {}
        try:
            self._prototypes["no-se"] = without_se(stock).to(device)
            settle(self._prototypes["no-se"], size, seed)
        except Exception as error:
            self._prototypes["no-se"] = error
        self._prototypes["stock"] = stock.to(device)
        settle(stock, size, seed)

    def _prototype(self, name: str) -> nn.Module:
        if name not in self._prototypes:  # proofs take seconds: made when they are needed
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", UserWarning)  # nothing fused: the variant has a note, or an error
                    self._prototypes[name] = self._make(name)
            except Exception as error:
                self._prototypes[name] = error
        found = self._prototypes[name]
        if isinstance(found, Exception):
            raise found
        return found

    def _make(self, name: str) -> nn.Module:
        stock = self._prototypes["stock"]
        if name == "folded":
            return _folded(stock, self._backend, fused=False)
        if name == "folded+fused":
            return _folded(_fusible(stock), self._backend, fused=True)
        return fuse(copy.deepcopy(_fusible(stock)), backend=self._backend, tails=name == "tails")

    def build(self, variant: Variant, case: ModelCase) -> None:
        """Gives the variant a fresh copy for one case. Raises NoVariant, or why it cannot be made."""
        folded = variant.prototype in _FOLDED
        if folded and case.training:
            raise NoVariant("for inference only: its BatchNorms are folded into the convolutions")
        model = copy.deepcopy(self._prototype(variant.prototype))
        if not case.amp:
            model.to(getattr(torch, case.dtype))
        model.to(memory_format=case.memory_format).train(case.training)
        if folded:
            names, left, joined = model.folding
            variant.norms_folded, variant.se_joined = len(names), len(joined)
            if left:
                variant.remark(f"{len(left)} BatchNorms are not folded; {left[0][0]} is not: {left[0][1]}")
        if variant.prototype in ("fused", "tails", "folded+fused"):
            _count_fused(variant, model)
        variant.model = variant.call = model
        if variant.compiled:
            # Not as one graph: a network may have breaks of its own.
            mode = "max-autotune" if variant.name == "max-autotune" else None
            variant.call, variant.require_a_graph = under_compile(model, mode, fullgraph=False)


def _count_fused(variant: Variant, model: nn.Module) -> None:
    """Notes how many layers are fused and how many blocks run with tails, and if not all why the first is not.

    Raises NoVariant if no block of tails does, RuntimeError if no layer is fused.
    """
    tails = variant.prototype == "tails"
    report = fuse_report(model, tails=tails)
    if tails and not report.blocks:
        raise NoVariant("no tails: there is no block around an SE layer")
    variant.se_fused = sum(layer.fused for layer in report.layers)
    about_layers = _left(report.layers, "SE layers fused", "is")
    if tails:
        variant.se_blocks, variant.se_tails = len(report.blocks), sum(block.fused for block in report.blocks)
        about_blocks = _left(report.blocks, "blocks run with tails", "does")
        if not variant.se_tails:
            raise NoVariant(f"no tails: {about_blocks}")
    if not variant.se_fused:
        raise RuntimeError(about_layers)
    for text in (about_layers, about_blocks if tails else ""):
        if text:
            variant.remark(text)


def _left(found: Sequence[Any], what: str, verb: str) -> str:
    """How many rows of a report are fused, and why the first of the others is not; empty if all are."""
    left = [one for one in found if not one.fused]
    if not left:
        return ""
    first = f"{left[0].name or 'the network'} {verb} not: {left[0].reason}"
    return f"{len(found) - len(left)} of {len(found)} {what}; {first}"
