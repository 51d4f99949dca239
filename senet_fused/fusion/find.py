"""The SE layers of a model and the blocks around them, and what can become of each."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from ..modules import FusedSE
from .blocks import BlockFusion, FusedBlock, examine_block, kind_of_block, main_se
from .families import family_of, has_se_weights, is_named_like_se, may_be_se, not_covered
from .layer import fused_class, is_fused
from .proof import examine
from .recipe import Recipe
from .tails import FusedSETail
from .trial import CannotFuseError, errors_as_reasons

__all__ = ["Found", "find_blocks", "find_layers"]


class Found(NamedTuple):
    """A layer or block by its name in the model, its kind in words, and how it runs fused, or why it is left.

    how: None of a layer of this package, which is fused by itself.
    """

    name: str
    module: nn.Module
    kind: str
    how: Recipe | BlockFusion | str | None


def find_layers(model: nn.Module, verify: bool, proofs: dict[Any, Any]) -> list[Found]:
    """The SE layers of a model. What lies within one is part of it, and is not looked at by itself.

    proofs: what is known of layers and blocks by their structure, from one call; it is added to.
    """
    seen: set[nn.Module] = set()

    def visit(name: str, module: nn.Module) -> list[Found]:
        if module in seen:
            return []
        seen.add(module)
        if isinstance(module, FusedSE):
            return [Found(name, module, "FusedSE", None)]
        if is_fused(module):
            recipe = module._senet_fused.recipe
            return [Found(name, module, recipe.kind, recipe)]
        another, family, failure = not_covered(module), None, None
        try:
            with errors_as_reasons("it cannot be examined"):
                family = family_of(module)
        except CannotFuseError as error:
            failure = error
        tail = isinstance(module, FusedSETail)  # named like a layer, which is inside it
        if tail or (another is None and family is None):
            within = [
                found
                for child_name, child in module.named_children()
                for found in visit(f"{name}.{child_name}".lstrip("."), child)
            ]
            if within or tail or not may_be_se(module):
                return within
        try:
            if failure is not None:
                raise failure
            recipe = examine(module, verify=verify, proofs=proofs)
            fused_class(type(module))
            return [Found(name, module, recipe.kind, recipe)]
        except CannotFuseError as error:
            seems = another or is_named_like_se(module) or ((family or failure) and has_se_weights(module))
            return [Found(name, module, type(module).__name__, another or str(error))] if seems else []

    return visit("", model)


_UNKNOWN = (
    "its forward is not one that is known: BatchNorm -> SE -> + shortcut -> ReLU as timm's, Cadene's and MONAI's "
    "bottlenecks have it (BatchNorm -> activation -> SE is not covered)"
)


def find_blocks(model: nn.Module, layers: list[Found], verify: bool, proofs: dict[Any, Any]) -> list[Found]:
    """The known blocks, and what else has an SE layer in it, in the order of the SE layers."""
    modules = dict(model.named_modules())
    found: dict[str, Found] = {}
    for layer in layers:
        if not layer.name:
            continue  # the model is the layer
        parts = layer.name.split(".")
        above = [".".join(parts[:i]) for i in range(len(parts) - 1, -1, -1)]
        for path in above:
            block = modules[path]
            kind = block._senet_fused.kind if isinstance(block, FusedBlock) else kind_of_block(block)
            if kind is not None and main_se(block, kind) is layer.module:
                if path not in found:
                    found[path] = Found(path, block, kind, _how(block, kind, verify, proofs))
                break
        else:
            block = modules[above[0]]
            found.setdefault(above[0], Found(above[0], block, type(block).__name__, _UNKNOWN))
    return list(found.values())


def _how(block: nn.Module, kind: str, verify: bool, proofs: dict[Any, Any]) -> BlockFusion | str:
    if isinstance(block, FusedBlock):
        return block._senet_fused
    try:
        fusion = examine_block(block, kind, verify=verify, proofs=proofs)
        fused_class(type(block), FusedBlock)
        return fusion
    except CannotFuseError as error:
        return str(error)
