"""From somebody's SE layer to a FusedSE with its weights."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from ..state_dicts import from_state_dict
from .proof import examine
from .trial import CannotFuseError

__all__ = ["from_module"]


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
