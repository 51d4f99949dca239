"""How a layer becomes a fused one and stays itself: its class is exchanged for a subclass with another forward.

The object, its parameters, buffers, hooks, keys and place in the model are untouched. A subclass is made once for every
class that is fused (so ``isinstance`` goes on as before) and pickles by name: what is saved is the original class and
:func:`_restore`, so any process that can import both reads it back, and ``copy.deepcopy`` goes the same way.
"""

from __future__ import annotations

from typing import Any, NamedTuple, NoReturn

import torch
from torch import nn

from .. import select
from ..functional import route
from ..modules import RecordsGates
from ..recognition import Recipe

__all__ = ["FusedLayer", "Fusion", "attach", "check_detachable", "detach", "is_fused", "original_class"]


class Fusion(NamedTuple):
    """What a fused layer carries: its recipe, the backend that ``fuse`` was given, and whether the recipe is proven."""

    recipe: Recipe
    backend: str | None
    verified: bool


class FusedLayer(RecordsGates):
    """The part of a fused layer's class that runs squeeze_excite in place of the original forward.

    The original forward runs instead, and :meth:`refusal` says why, wherever it could tell the difference or would be
    faster: a child with hooks, parametrisations or other weights than plain tensors; an input that the layer was not
    read for; code that traces PyTorch's own operators (TorchScript, ONNX, torch.func, forward-mode derivatives); and
    where "auto" has no kernels, as on a GPU under torch.compile, which fuses the original's operators itself.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        recipe, backend, _ = self._senet_fused
        x = recipe.input_of(args, kwargs)
        weights = None if x is None or recipe.mismatch(x) is not None else recipe.weights(self)
        if not isinstance(weights, tuple):
            return super().forward(*args, **kwargs)
        if isinstance(x, torch.fx.Proxy):
            return recipe.apply(weights, x, chosen=None, with_gate=False)[0]
        chosen = route(x, backend)
        if chosen == "reference" and select.requested(backend)[0] != "reference":
            return super().forward(*args, **kwargs)
        if self._captured is None:
            return recipe.apply(weights, x, chosen=chosen, with_gate=False)[0]
        y, gate = recipe.apply(weights, x, chosen=chosen, with_gate=True)
        self._record(gate)
        return y

    def __prepare_scriptable__(self) -> NoReturn:
        raise RuntimeError("torch.jit.script cannot compile a fused layer; call senet_fused.unfuse(model) before")

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        original = original_class(self)
        if original is None:
            return super().__reduce_ex__(protocol)
        _, _, state, *rest = super().__reduce_ex__(2)
        if isinstance(state, dict):
            state = {**state, "_captured": None}
        return (_restore, (original,), state, *rest)


_classes: dict[type[nn.Module], type[nn.Module]] = {}


def fused_class(original: type[nn.Module]) -> type[nn.Module]:
    """The subclass of both FusedLayer and a layer's class, made at the first call."""
    if original not in _classes:
        members = {"__module__": __name__, "__doc__": original.__doc__}
        _classes[original] = type(f"Fused{original.__name__}", (FusedLayer, original), members)
    return _classes[original]


def original_class(layer: nn.Module) -> type[nn.Module] | None:
    """The class that a fused layer had before; None if it is not fused, or its class has been changed since."""
    kind = type(layer)
    if not is_fused(layer) or len(kind.__bases__) != 2:
        return None
    original = kind.__bases__[1]
    return original if _classes.get(original) is kind else None


def is_fused(layer: nn.Module) -> bool:
    """Whether fuse has converted the layer."""
    return isinstance(layer, FusedLayer)


def attach(layer: nn.Module, fusion: Fusion) -> None:
    """Makes the layer a fused one, in place."""
    layer.__dict__.update(_senet_fused=fusion, _captured=None)
    layer.__class__ = fused_class(type(layer))


def check_detachable(layer: nn.Module) -> None:
    """Raises RuntimeError if something has changed the class of a fused layer since."""
    if original_class(layer) is None:
        raise RuntimeError(
            f"the class of a fused layer has been changed to {type(layer).__name__} by something else after fuse "
            "(fully_shard and parametrisations do that); undo that first, or unfuse before"
        )


def detach(layer: nn.Module) -> None:
    """Makes a fused layer what it was before."""
    check_detachable(layer)
    layer.__class__ = original_class(layer)
    for name in ("_senet_fused", "_captured"):
        layer.__dict__.pop(name, None)


def _restore(original: type[nn.Module]) -> nn.Module:
    """The empty object that a pickled or copied fused layer is filled into."""
    kind = fused_class(original)
    return kind.__new__(kind)
