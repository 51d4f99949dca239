"""fuse(model): the SE layers of somebody's model run fused, in place, proven, and can be made what they were."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import nn

from .. import select
from ..modules import FusedSE
from ..recognition import (
    Recipe,
    Unsuited,
    examine,
    family_of,
    has_weights_of_one,
    looks_like_one,
    may_be_one,
    not_covered,
    unsuited,
)  # fmt: skip
from ..tails import FusedSETail
from .blocks import FORMS, BlockFusion, FusedBlock, block_alteration, examine_block, form_of, main_se
from .layer import (
    GATE_FORMS,
    Exchanged,
    Fusion,
    alteration,
    attach,
    check_detachable,
    detach,
    fused_class,
    is_fused,
    slower,
)  # fmt: skip
from .report import BlockReport, FuseReport, LayerReport

__all__ = ["BlockReport", "FuseReport", "LayerReport", "fuse", "fuse_report", "unfuse"]


def fuse(model: nn.Module, *, backend: str | None = None, tails: bool = False, verify: bool = True) -> nn.Module:
    """Makes the SE layers of a model run fused, in place, and returns the same model.

    Layers of torchvision, timm, Cadene, MONAI, transformers, OpenMMLab, NVIDIA's examples, segmentation_models.pytorch
    and the usual ``SELayer`` are found by their structure, whatever their classes are called, also inside
    DistributedDataParallel and torch.compile's wrapper, and also if the model itself is one. Each keeps its identity,
    parameters, keys, hooks and mode (its class becomes a subclass of its own one). :func:`fuse_report` says what became
    of each layer and why, :func:`unfuse` undoes it.

    Args:
        model: any module. Its layers may be on any device, also meta, and in any floating dtype.
        backend: as in :func:`senet_fused.squeeze_excite`, for these layers. Calling fuse again changes it.
        tails: also run BatchNorm -> SE -> + shortcut -> ReLU as one operator (:func:`senet_fused.block_tail`) in blocks
            whose forward is known: the bottlenecks of timm, Cadene and MONAI and timm's basic block, with SE layers in
            them. Their other BatchNorms and ReLUs run as tails without a gate.
        verify: run a copy of each layer, in float64 on the CPU with random weights, and compare outputs and all
            gradients before it is converted; a layer that differs stays as it is, and so does one whose forward does
            anything besides (it changes what it holds, or a global, or it prints), and so does a block, whose running
            statistics are compared, too. False trusts the layer's structure, and leaves layers of families that are
            not known.

    Raises:
        TypeError: model is no module.
        ValueError: an unknown backend.

    Whatever goes wrong while a layer is examined is a reason to leave that layer, and no error.

    Warns:
        UserWarning: no layer could be fused; the message says what was found.

    >>> model = senet_fused.fuse(timm.create_model("seresnet50", pretrained=True))
    >>> print(senet_fused.fuse_report(model))
    """
    _check_model(model, "fuse")
    select.check_name(backend, "fuse")
    proven: Proven = {}
    found = _find(model, verify, proven)
    for one in found:
        if is_fused(one.layer):
            one.layer.__dict__["_senet_fused"] = one.layer._senet_fused._replace(backend=backend)
        elif isinstance(one.verdict, Recipe):
            attach(one.layer, Fusion(one.verdict, backend, verify))
    blocks = _find_blocks(model, found, verify, proven) if tails else []
    for one in blocks:
        if not isinstance(one.block, FusedBlock) and isinstance(one.verdict, BlockFusion):
            attach(one.block, one.verdict, FusedBlock)
    for module in model.modules():
        if isinstance(module, FusedBlock) and module._senet_fused is not None:
            module.__dict__["_senet_fused"] = module._senet_fused._replace(backend=backend)
    if not any(is_fused(one.layer) or isinstance(one.layer, FusedSE) for one in found):
        reasons = "".join(f"; {one.name or 'the model'}: {one.verdict}" for one in found[:_REASONS])
        more = ", ..." if len(found) > _REASONS else ""
        warnings.warn(f"fuse: nothing was fused. {_report(model, found).summary}{reasons}{more}", stacklevel=2)
    elif tails and not any(isinstance(one.block, FusedBlock) for one in blocks):
        reasons = "".join(f"; {one.name or 'the model'}: {one.verdict}" for one in blocks[:_REASONS])
        warnings.warn(f"fuse: no block runs with tails{reasons or ': no block with an SE layer found'}", stacklevel=2)
    return model


def unfuse(model: nn.Module) -> nn.Module:
    """Makes every layer and block that :func:`fuse` converted exactly what it was, and returns the same model.

    Raises:
        TypeError: model is no module.
        RuntimeError: something else has changed the class of a fused layer since (fully_shard, a parametrisation of the
            layer itself); nothing has been changed then.
    """
    _check_model(model, "unfuse")
    layers = [layer for layer in model.modules() if isinstance(layer, Exchanged) and layer._senet_fused is not None]
    for layer in layers:
        check_detachable(layer)
    for layer in layers:
        detach(layer)
    return model


def fuse_report(model: nn.Module, *, tails: bool = False) -> FuseReport:
    """Every SE layer of a model, and what looks like one: its name, kind and sizes, whether it is fused, and why (not).

    It tells the present state: a layer whose child has got a hook since is reported with "original runs", and in a
    model that fuse has not seen, layers "can be fused", which is found out as fuse would (copies run, nothing changes).
    Blocks that run with tails are part of it; with ``tails=True`` all blocks around SE layers are.

    Raises:
        TypeError: model is no module.
    """
    _check_model(model, "fuse_report")
    proven: Proven = {}
    found = _find(model, True, proven)
    tails = tails or any(isinstance(module, FusedBlock) for module in model.modules())
    blocks = _find_blocks(model, found, True, proven) if tails else []
    rows = tuple(_block_row(one) for one in blocks)
    return FuseReport(type(model).__name__, _report(model, found).layers, rows)


Proven = dict[Any, Any]  # what is known of layers and blocks by their structure, from one call
_REASONS = 3  # of so many layers in a warning; fuse_report has them all


class _Found(NamedTuple):
    """A layer by its name in the model, and its recipe, or the reason to leave it (None: our own layer)."""

    name: str
    layer: nn.Module
    verdict: Recipe | str | None


def _check_model(model: nn.Module, function: str) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function} takes a torch.nn.Module, got {type(model).__name__}")


def _find(model: nn.Module, verify: bool, proven: Proven) -> list[_Found]:
    """The SE layers of a model. What lies within one is part of it, and is not looked at by itself."""
    seen: set[nn.Module] = set()

    def visit(name: str, module: nn.Module) -> list[_Found]:
        if module in seen:
            return []
        seen.add(module)
        if isinstance(module, FusedSE):
            return [_Found(name, module, None)]
        if is_fused(module):
            return [_Found(name, module, module._senet_fused.recipe)]
        another, family, failure = not_covered(module), None, None
        try:
            with unsuited("it cannot be examined"):
                family = family_of(module)
        except Unsuited as error:
            failure = error
        tail = isinstance(module, FusedSETail)  # named like a layer, which is inside it
        if tail or (another is None and family is None):
            within = [
                found
                for child_name, child in module.named_children()
                for found in visit(f"{name}.{child_name}".lstrip("."), child)
            ]
            if within or tail or not may_be_one(module):
                return within
        try:
            if failure is not None:
                raise failure
            recipe = examine(module, verify=verify, proven=proven)
            fused_class(type(module))
            return [_Found(name, module, recipe)]
        except Unsuited as error:
            seems = another or looks_like_one(module) or ((family or failure) and has_weights_of_one(module))
            return [_Found(name, module, another or str(error))] if seems else []

    return visit("", model)


class _FoundBlock(NamedTuple):
    """A block around an SE layer: its form (None: not known), and what it is to carry, or why it is left."""

    name: str
    block: nn.Module
    kind: str | None
    verdict: BlockFusion | str


_UNKNOWN = (
    "its forward is not one that is known: BatchNorm -> SE -> + shortcut -> ReLU as timm's, Cadene's and MONAI's "
    "bottlenecks have it (BatchNorm -> activation -> SE is not covered)"
)


def _find_blocks(model: nn.Module, found: list[_Found], verify: bool, proven: Proven) -> list[_FoundBlock]:
    """The blocks of known forms, and what else has an SE layer in it, in the order of the SE layers."""
    modules = dict(model.named_modules())
    within: dict[str, _FoundBlock] = {}
    for name, layer, *_ in found:
        if not name:
            continue  # the model is the layer
        parts = name.split(".")
        above = [".".join(parts[:i]) for i in range(len(parts) - 1, -1, -1)]
        for path in above:
            block = modules[path]
            kind = block._senet_fused.kind if isinstance(block, FusedBlock) else form_of(block)
            if kind is not None and main_se(block, kind) is layer:
                if path not in within:
                    within[path] = _FoundBlock(path, block, kind, _verdict(block, kind, verify, proven))
                break
        else:
            path = above[0]
            within.setdefault(path, _FoundBlock(path, modules[path], None, _UNKNOWN))
    return list(within.values())


def _verdict(block: nn.Module, kind: str, verify: bool, proven: Proven) -> BlockFusion | str:
    if isinstance(block, FusedBlock):
        return block._senet_fused
    try:
        fusion = examine_block(block, kind, verify=verify, proven=proven)
        fused_class(type(block), FusedBlock)
        return fusion
    except Unsuited as error:
        return str(error)


def _block_row(one: _FoundBlock) -> BlockReport:
    kind = one.kind or type(one.block).__name__
    if isinstance(one.verdict, str):
        return BlockReport(one.name, kind, 0, "left", one.verdict)
    norms = len(FORMS[one.kind].norms)
    if not isinstance(one.block, FusedBlock):
        return BlockReport(one.name, kind, norms, "can be fused", "every BatchNorm as a tail")
    if "forward" in vars(one.block):
        return BlockReport(one.name, kind, 0, "original runs", "its forward has been replaced on the object")
    if (altered := block_alteration(one.block)) is not None:
        return BlockReport(one.name, kind, 0, "original runs", altered)
    weight = next(one.block.parameters())
    backend, verified = one.block._senet_fused[3:]
    served = "every BatchNorm as a tail" + ("" if verified else "; not verified")
    if weight.device.type != "meta":
        try:
            chosen, reason = select.choose(backend, weight.device.type, weight.dtype)
        except select.BackendUnavailableError as error:
            return BlockReport(one.name, kind, 0, "cannot run", str(error))
        if chosen == "reference" and select.requested(backend)[0] == "auto":
            return BlockReport(one.name, kind, 0, "original runs", f"no kernels: {reason}")
        served += f"; backend {chosen}"
    return BlockReport(one.name, kind, norms, "fused", served)


_REPLACED = "its forward has been replaced on the object, and that runs"
_GATE_ON_A_CPU = "a gate alone, which PyTorch's own operators make faster on a CPU; backend='cpu' has the kernels run"
_SERVED = {
    "scale": "the whole layer",
    "residual": "the whole layer, with its addition of the input",
    "gate": "the gate; the multiplication is its caller's and stays there",
    "flat_gate": "the gate; the multiplication is its caller's and stays there",
}


def _report(model: nn.Module, found: Iterable[_Found]) -> FuseReport:
    return FuseReport(type(model).__name__, tuple(_row(*one) for one in found))


def _row(name: str, layer: nn.Module, verdict: Recipe | str | None) -> LayerReport:
    if verdict is None:
        what = (name, "FusedSE", "scale", layer.channels, layer.rd_channels)
        if "forward" in vars(layer):
            return LayerReport(*what, "original runs", _REPLACED)
        if isinstance(altered := layer._weights(), str):
            return LayerReport(*what, "original runs", f"its children are called: {altered}")
        return LayerReport(*what, "fused", "a layer of this package")
    if isinstance(verdict, str):
        return LayerReport(name, type(layer).__name__, None, None, None, "left", verdict)
    what = (name, verdict.kind, verdict.form, verdict.channels, verdict.rd_channels)
    if not is_fused(layer):
        return LayerReport(*what, "can be fused", _SERVED[verdict.form])
    if "forward" in vars(layer):
        return LayerReport(*what, "original runs", _REPLACED)
    if (altered := alteration(layer)) is not None:
        return LayerReport(*what, "original runs", altered)
    weight = next(layer.parameters())
    backend, verified = layer._senet_fused[1:]
    served = _SERVED[verdict.form] + ("" if verified else "; not verified")
    if weight.device.type != "meta":
        try:
            choice = select.choose(backend, weight.device.type, weight.dtype)
        except select.BackendUnavailableError as error:
            return LayerReport(*what, "cannot run", str(error))
        auto = select.requested(backend)[0] == "auto"
        if choice.backend == "reference" and auto:
            return LayerReport(*what, "original runs", f"no kernels: {choice.reason}")
        if verdict.form in GATE_FORMS and slower(backend, weight.device.type):
            return LayerReport(*what, "original runs", _GATE_ON_A_CPU)
        served += f"; backend {choice.backend}"
    return LayerReport(*what, "fused", served)
