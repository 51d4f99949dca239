"""fuse(model): the SE layers of somebody's model run fused, in place, proven; unfuse(model) restores them."""

from __future__ import annotations

import copy
import warnings
from typing import Any

from torch import nn

from .. import select
from ..modules import FusedSE
from ..state_dicts import from_state_dict
from .blocks import BlockFusion, FusedBlock
from .find import Found, find_blocks, find_layers
from .layer import FusedModule, Fusion, check_revertible, convert, is_fused, revert
from .proof import examine
from .recipe import Recipe
from .report import FuseReport, block_report, layer_report
from .trial import CannotFuseError

__all__ = ["from_module", "fuse", "fuse_report", "unfuse"]


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
    proofs: dict[Any, Any] = {}
    layers = find_layers(model, verify, proofs)
    for layer in layers:
        if isinstance(layer.how, Recipe) and not is_fused(layer.module):
            convert(layer.module, Fusion(layer.how, backend, verify))
    blocks = find_blocks(model, layers, verify, proofs) if tails else []
    for block in blocks:
        if isinstance(block.how, BlockFusion) and not isinstance(block.module, FusedBlock):
            convert(block.module, block.how, FusedBlock)
    for module in _fused_modules(model):
        module.__dict__["_senet_fused"] = module._senet_fused._replace(backend=backend)
    if not any(is_fused(layer.module) or isinstance(layer.module, FusedSE) for layer in layers):
        summary = FuseReport(type(model).__name__, tuple(map(layer_report, layers))).summary
        more = ", ..." if len(layers) > _REASONS else ""
        warnings.warn(f"fuse: nothing was fused. {summary}{_reasons(layers)}{more}", stacklevel=2)
    elif tails and not any(isinstance(block.module, FusedBlock) for block in blocks):
        reasons = _reasons(blocks) or ": no block with an SE layer found"
        warnings.warn(f"fuse: no block runs with tails{reasons}", stacklevel=2)
    return model


def unfuse(model: nn.Module) -> nn.Module:
    """Makes every layer and block that :func:`fuse` converted exactly what it was, and returns the same model.

    Raises:
        TypeError: model is no module.
        RuntimeError: something else has changed the class of a fused layer since (fully_shard, a parametrisation of the
            layer itself); nothing has been changed then.
    """
    _check_model(model, "unfuse")
    modules = _fused_modules(model)
    for module in modules:
        check_revertible(module)
    for module in modules:
        revert(module)
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
    proofs: dict[Any, Any] = {}
    layers = find_layers(model, True, proofs)
    tails = tails or any(isinstance(module, FusedBlock) for module in model.modules())
    blocks = find_blocks(model, layers, True, proofs) if tails else []
    return FuseReport(type(model).__name__, tuple(map(layer_report, layers)), tuple(map(block_report, blocks)))


def from_module(cls: type, layer: nn.Module) -> Any:
    """See ``FusedSE.from_module``."""
    if isinstance(layer, cls):
        return copy.deepcopy(layer)
    kind = type(layer).__name__
    try:
        recipe = examine(layer)
    except CannotFuseError as error:
        raise ValueError(f"{kind} is not understood as an SE layer: {error}") from error
    if recipe.form == "residual":
        raise ValueError(
            f"{kind} adds its input to the result, which is no part of FusedSE; load its weights with "
            "FusedSE.from_state_dict and call that as layer(x, residual=x); senet_fused.fuse converts it in place"
        )
    if recipe.form != "scale" or recipe.channels_last:
        what = "takes its channels last" if recipe.channels_last else "returns the gate, not the scaled input"
        raise ValueError(f"{kind} {what}, which FusedSE does not; senet_fused.fuse converts it in place")
    paths = {"fc1": ".".join(recipe.first), "fc2": ".".join(recipe.second)}
    weights = {f"{fc}.{k}": p for fc, path in paths.items() for k, p in layer.get_submodule(path).named_parameters()}
    fused = from_state_dict(
        cls, {name: p.detach() for name, p in weights.items()}, act=recipe.act, gate=recipe.gate, squeeze=recipe.squeeze
    )
    for name, parameter in fused.named_parameters():
        parameter.requires_grad_(weights[name].requires_grad)
    return fused.train(layer.training)


_REASONS = 3  # of so many layers in a warning; fuse_report has them all


def _check_model(model: nn.Module, function: str) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function} takes a torch.nn.Module, got {type(model).__name__}")


def _fused_modules(model: nn.Module) -> list[Any]:
    """The layers and blocks that fuse has converted."""
    return [m for m in model.modules() if isinstance(m, FusedModule) and m._senet_fused is not None]


def _reasons(found: list[Found]) -> str:
    return "".join(f"; {one.name or 'the model'}: {one.how}" for one in found[:_REASONS])
