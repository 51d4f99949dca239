"""A recipe: how the parts of somebody's SE layer become one call of squeeze_excite, and when they no longer do."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..activations import Activation
from ..functional import excitation, serve, squeeze_excite

__all__ = ["FORMS", "Part", "Recipe", "parts_of", "settings_of"]

# What the layer returns: x * gate, x * gate + x, the gate [N, C, 1, ...], or the gate [N, C].
FORMS = ("scale", "residual", "gate", "flat_gate")

# Exactly these: a subclass may compute something else, and a subclass of Tensor may not hold the numbers it stands for.
_PLAIN_TENSORS = (Tensor, nn.Parameter)

Weights = tuple[Tensor, Tensor, "Tensor | None", "Tensor | None"]


class Part(NamedTuple):
    """A submodule as it was when the layer was read: where it is, and what its call depends on."""

    path: tuple[str, ...]
    kind: type[nn.Module]
    children: int
    settings: tuple[tuple[str, object], ...]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a layer computes, as arguments of squeeze_excite, with the parts that it depends on.

    kind: the family in words. first, second: paths of the two children with the weights. act, gate, squeeze: as in
        squeeze_excite. form: one of :data:`FORMS`. channels, rd_channels: C and R. channels_last: x is
        [N, *spatial, C]. dimensions: the numbers of spatial dimensions of x that it holds for. argument: the name of
        x in the layer's forward. children, flags: the number of the layer's own children and its switches as they
        were. parts: every submodule, outermost first.
    """

    kind: str
    first: tuple[str, ...]
    second: tuple[str, ...]
    act: Activation
    gate: Activation
    squeeze: str
    form: str
    channels: int
    rd_channels: int
    channels_last: bool
    dimensions: tuple[int, ...]
    argument: str
    children: int
    flags: tuple[tuple[str, object], ...]
    parts: tuple[Part, ...]

    def __deepcopy__(self, memo: object) -> Recipe:
        return self

    def input_of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """x, of a call with that one argument; None for any other call."""
        if len(args) == 1 and not kwargs:
            return args[0]
        if len(kwargs) == 1 and not args:
            return kwargs.get(self.argument)
        return None

    def alteration(self, layer: nn.Module) -> str | None:
        """Why the layer's parts have to be called, now that they are not what was read; None if they are."""
        weights = self.weights(layer)
        return weights if isinstance(weights, str) else None

    def weights(self, layer: nn.Module) -> Weights | str:
        """w1, w2, b1, b2 of the layer; or, as text, why its parts have to be called instead.

        A fused layer reads its children's weights and calls no child, so all that could make a child's call differ
        from the bare function of its weights is looked for: another class, hooks, an own forward, a parametrisation,
        weights that are not plain tensors, settings. Every call of a fused layer comes by here.
        """
        if nn.modules.module._has_any_global_hook():
            return "hooks for all modules are registered, and they are to see its children"
        for name, value in self.flags:
            if layer.__dict__.get(name) != value:
                return f"its {name} was {value!r} and has been changed"
        if len(layer._modules) != self.children:
            return f"it had {self.children} children and has {len(layer._modules)}"
        for path, kind, children, settings in self.parts:
            part = layer
            for name in path:
                part = part._modules.get(name)
                if part is None:
                    return f"its {'.'.join(path)} has been removed"
            if type(part) is not kind and not _is_wrapped_by_export(part, kind):
                return f"its {'.'.join(path)} was a {kind.__name__} and is a {type(part).__name__}"
            if part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks:
                return f"its {'.'.join(path)} has hooks, which only run if it is called"
            own = part.__dict__
            if "forward" in own:
                return f"the forward of its {'.'.join(path)} has been replaced"
            if len(part._modules) != children:
                return f"its {'.'.join(path)} had {children} children and has {len(part._modules)}"
            for name, value in settings:
                if own.get(name) != value:
                    return f"{name} of its {'.'.join(path)} was {value!r} and has been changed"
        first, second = _at(layer, self.first), _at(layer, self.second)
        weights = (
            _tensor(first, "weight"), _tensor(second, "weight"), _tensor(first, "bias"), _tensor(second, "bias"),
        )  # fmt: skip
        for t in weights:
            if t is not None and type(t) not in _PLAIN_TENSORS and not _is_stand_in(t):
                return f"one of its weights is a {type(t).__name__}, not a plain tensor"
        return weights

    def mismatch(self, x: Any) -> str | None:
        """Why this input goes to the layer's own forward; None if the recipe holds for it."""
        if type(x) not in _PLAIN_TENSORS:
            if isinstance(x, torch.fx.Proxy):
                return None if self.form in ("scale", "residual") else "a gate's shape is not known to FX"
            if not _is_stand_in(x):
                return f"its input is a {type(x).__name__}, not a plain tensor"
        if x.dim() - 2 not in self.dimensions:
            known = " or ".join(str(d + 2) for d in self.dimensions)
            return f"its input has {x.dim()} dimensions; the layer was read for {known}"
        return None

    def apply(self, weights: Weights, x: Tensor, *, chosen: str | None, with_gate: bool) -> tuple[Tensor, Any]:
        """What the layer returns for x, and the gate [N, C] if it is wanted (None if not).

        chosen: the backend, from functional.route; None leaves the choice to squeeze_excite and lets FX see it.
        """
        if self.form in ("gate", "flat_gate"):
            gate = excitation(
                x, *weights, act=self.act, gate=self.gate, squeeze=self.squeeze, backend=chosen
            )
            y = gate.to(x.dtype)
            return (y if self.form == "flat_gate" else y[(..., *(None,) * (x.dim() - 2))]), gate
        planes = x.movedim(-1, 1) if self.channels_last else x
        residual = planes if self.form == "residual" else None
        if chosen is None:
            result = squeeze_excite(
                planes, *weights, act=self.act, gate=self.gate, squeeze=self.squeeze, residual=residual
            )
        else:
            result = serve(
                chosen, planes, *weights, self.act, self.gate, self.squeeze, residual, None, with_gate
            )
        y, gate = result if with_gate else (result, None)
        return (y.movedim(1, -1) if self.channels_last else y), gate


def parts_of(layer: nn.Module) -> tuple[Part, ...]:
    """The submodules of a layer, outermost first."""
    return tuple(
        Part(tuple(name.split(".")), type(module), len(module._modules), settings_of(module))
        for name, module in layer.named_modules(remove_duplicate=False)
        if module is not layer
    )


def settings_of(module: nn.Module) -> tuple[tuple[str, object], ...]:
    """The public switches of a module that has no weights: a slope, dropout's probability, a pooling's output size."""
    if module._parameters or module._modules:
        return ()
    return tuple(
        (name, value)
        for name, value in vars(module).items()
        if not name.startswith("_")
        and name not in ("training", "inplace")
        and isinstance(value, (bool, int, float, str, tuple))
    )


def _at(layer: nn.Module, path: tuple[str, ...]) -> nn.Module:
    for name in path:
        layer = layer._modules[name]
    return layer


def _tensor(part: nn.Module, name: str) -> Any:
    """part's weight or bias; a plain attribute where something keeps the parameter elsewhere, as FSDP1 does."""
    own = part._parameters
    return own[name] if name in own else getattr(part, name)


def _is_wrapped_by_export(part: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether torch.export has put part in a module's place while it traces: of a subclass with the same name."""
    return torch.compiler.is_exporting() and isinstance(part, kind) and type(part).__name__ == kind.__name__


def _is_stand_in(t: object) -> bool:
    """Whether t stands for a plain tensor while somebody traces: FX's proxies, fake and functional tensors."""
    if isinstance(t, torch.fx.Proxy):
        return True
    from torch._subclasses.fake_tensor import FakeTensor
    from torch._subclasses.functional_tensor import FunctionalTensor

    return isinstance(t, (FakeTensor, FunctionalTensor))
