"""How a layer or block becomes a fused one and stays itself: its class is exchanged for one with another forward.

The object, its parameters, buffers, hooks, keys and place in the model are untouched. A subclass is made once for every
class that is fused (so ``isinstance`` goes on as before) and pickles by name: what is saved is the original class and
:func:`_restore`, so any process that can import both reads it back, and ``copy.deepcopy`` goes the same way.
"""

from __future__ import annotations

import functools
import types
import warnings
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from .. import select
from ..functional import route
from ..modules import RecordsGates
from ..parts import OWN_ATTRIBUTES
from .recipe import GATE_FORMS, Recipe
from .trial import CannotFuseError

__all__ = [
    "FusedLayer", "FusedModule", "Fusion", "alteration", "check_revertible", "class_before", "convert", "fused_class",
    "is_fused", "is_slower", "original_class", "revert",
]  # fmt: skip


class Fusion(NamedTuple):
    """What a fused layer carries: its recipe, the backend that ``fuse`` was given, and whether the recipe is proven."""

    recipe: Recipe
    backend: str | None
    verified: bool


class FusedModule:
    """The part of an exchanged class that is the same for layers and blocks: what it carries, and how it pickles."""

    _senet_fused: Any = None  # of a new object of this class, which nothing is known of
    _senet_original: tuple[Any, Any] = (None, None)  # the class, and its forward when a layer was proven last

    def __prepare_scriptable__(self) -> NoReturn:
        raise RuntimeError("torch.jit.script cannot compile a fused layer; call senet_fused.unfuse(model) before")

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        original = original_class(self)
        if original is None:
            return super().__reduce_ex__(protocol)
        _, _, state, *rest = super().__reduce_ex__(2)
        if isinstance(state, dict):
            state = {**state, "_senet_captured": None}
        return (_restore, (original, type(self).__bases__[0]), state, *rest)


class FusedLayer(FusedModule, RecordsGates):
    """The part of a fused layer's class that runs squeeze_excite in place of the original forward.

    The original forward runs instead where it could tell the difference or is faster: where the layer or a part of
    it is not what it was (``Recipe.weights`` says why), for an input it was not read for (``Recipe.accepts``), where
    "auto" runs PyTorch's own operators: under torch.compile and torch.export, TorchScript's tracer, torch.func,
    forward-mode differentiation, and where there are no kernels.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._senet_fused is None:
            return super().forward(*args, **kwargs)
        recipe, backend, _ = self._senet_fused
        original, proven = self._senet_original
        x = recipe.input_of(args, kwargs)
        weights = None
        recording = self._senet_captured is not None
        if recipe.form in GATE_FORMS and not recording and isinstance(x, Tensor) and is_slower(backend, x.device.type):
            return super().forward(*args, **kwargs)
        if x is not None and original.forward is proven and recipe.accepts(x):
            weights = recipe.weights(self)
        if not isinstance(weights, tuple):
            if recording and not torch.compiler.is_compiling():
                warnings.warn("capture_gates: an SE layer's original forward runs, which records no gate", stacklevel=2)
            return super().forward(*args, **kwargs)
        if isinstance(x, torch.fx.Proxy):
            return recipe.apply(weights, x, chosen="", backend=backend)[0]
        chosen = route(x, backend)
        if not recording:
            if chosen == "reference" and select.requested(backend)[0] != "reference":
                return super().forward(*args, **kwargs)
            return recipe.apply(weights, x, chosen=chosen)[0]
        y, gate = recipe.apply(weights, x, chosen=chosen, with_gate=True)
        self._senet_record(gate)
        return y


def is_slower(backend: str | None, device_type: str) -> bool:
    """Whether a gate alone is known to be made faster by the original, PyTorch's own four operators: on a CPU.

    Measured with torch 2.13, 2 cores of a Zen 4, float32, both layouts, nn.Linear inside: for C = 64 at 14x14 and 256
    at 28x28 the operator took 1.1 to 1.7 times as long, forward, and forward and backward.
    """
    return device_type == "cpu" and select.requested(backend)[0] == "auto"


_classes: dict[tuple[type[nn.Module], type[FusedModule]], type[nn.Module]] = {}


def fused_class(original: type[nn.Module], mixin: type[FusedModule] = FusedLayer) -> type[nn.Module]:
    """The subclass of both the mixin and a layer's class, made at the first call.

    Raises:
        CannotFuseError: there can be none; or the class pickles in a way of its own, which the subclass would not.
    """
    if issubclass(original, mixin):
        return original  # of an object that was made from a fused layer's class
    if (original, mixin) not in _classes:
        if original.__reduce_ex__ is not object.__reduce_ex__ or original.__reduce__ is not object.__reduce__:
            raise CannotFuseError("its class has a __reduce__ of its own")
        members = {"__module__": __name__, "__doc__": original.__doc__}
        try:
            kind = type(original)(f"Fused{original.__name__}", (mixin, original), members)
        except Exception as error:
            raise CannotFuseError(f"its class cannot be subclassed: {error}") from error
        _pin(kind, mixin, original)
        _classes.setdefault((original, mixin), kind)
    return _classes[original, mixin]


def _pin(kind: type[nn.Module], mixin: type[FusedModule], original: type[nn.Module]) -> None:
    """Remembers the original's forward as the one that is proven, and gives kind a forward with its signature."""
    kind._senet_original = (original, original.forward)
    f = mixin.forward
    forward = types.FunctionType(f.__code__, f.__globals__, f.__name__, f.__defaults__, f.__closure__)
    # What export, FX and TorchScript's tracer read names and defaults of the arguments from.
    kind.forward = functools.update_wrapper(forward, original.forward, updated=())


def original_class(layer: nn.Module) -> type[nn.Module] | None:
    """The class that a fused layer had before; None if it is not fused, or its class has been changed since."""
    kind = type(layer)
    if not isinstance(layer, FusedModule) or layer._senet_fused is None or len(kind.__bases__) != 2:
        return None
    mixin, original = kind.__bases__
    return original if _classes.get((original, mixin)) is kind else None


def is_fused(layer: nn.Module) -> bool:
    """Whether fuse has converted the layer."""
    return isinstance(layer, FusedLayer) and layer._senet_fused is not None


def class_before(module: nn.Module) -> type[nn.Module]:
    """The class of a module; of a fused one that which it had before."""
    kind = type(module)
    return getattr(kind, "_senet_original", (None,))[0] or kind


def alteration(layer: nn.Module) -> str | None:
    """Why a fused layer's original forward runs whatever its input; None if it does not."""
    original, proven = layer._senet_original
    if original.forward is not proven:
        return f"the forward of {original.__name__} has been replaced since"
    weights = layer._senet_fused.recipe.weights(layer)
    return weights if isinstance(weights, str) else None


def convert(layer: nn.Module, fusion: Any, mixin: type[FusedModule] = FusedLayer) -> None:
    """Makes the layer a fused one, in place."""
    original = type(layer)
    kind = fused_class(original, mixin)
    if kind is not original:
        if kind._senet_original[1] is not original.forward:
            _pin(kind, mixin, original)
        object.__setattr__(layer, "__class__", kind)  # past what its class does about attributes
    layer.__dict__.update(dict.fromkeys(OWN_ATTRIBUTES), _senet_fused=fusion)


def check_revertible(layer: nn.Module) -> None:
    """Raises RuntimeError if something has changed the class of a fused layer since."""
    if "forward" in vars(layer):
        raise RuntimeError(
            f"the forward of a {type(layer).__name__} object has been replaced by something else after fuse; "
            "undo that first, or unfuse before"
        )
    if original_class(layer) is None:
        raise RuntimeError(
            f"the class of a fused layer has been changed to {type(layer).__name__} by something else after fuse "
            "(fully_shard and parametrisations do that); undo that first, or unfuse before"
        )


def revert(layer: nn.Module) -> None:
    """Makes a fused layer what it was before."""
    check_revertible(layer)
    object.__setattr__(layer, "__class__", original_class(layer))
    for name in OWN_ATTRIBUTES:
        layer.__dict__.pop(name, None)


def _restore(original: type[nn.Module], mixin: type[FusedModule]) -> nn.Module:
    """The empty object that a pickled or copied fused layer is filled into."""
    kind = fused_class(original, mixin)
    return kind.__new__(kind)
