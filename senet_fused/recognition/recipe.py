"""A recipe: how the parts of somebody's SE layer become one call of squeeze_excite, and when they no longer do."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import torch_private
from ..activations import Activation
from ..call import Call
from ..functional import excitation, serve, squeeze_excite

__all__ = [
    "FORMS", "Part", "Recipe", "Weights", "is_patched", "parts_of", "plain_weights", "quantising", "settings_of",
]  # fmt: skip

# What the layer returns: x * gate, x * gate + x, the gate [N, C, 1, ...], or the gate [N, C].
FORMS = ("scale", "residual", "gate", "flat_gate")

# Exactly these: a subclass may compute something else, and a subclass of Tensor may not hold the numbers it stands for.
_PLAIN_TENSORS = (Tensor, nn.Parameter)

Weights = tuple[Tensor, Tensor, "Tensor | None", "Tensor | None"]

# Of PyTorch's own classes, before anybody replaces one for all modules, as kernel libraries do.
_FORWARDS = {kind: kind.forward for kind in vars(nn).values() if isinstance(kind, type) and issubclass(kind, nn.Module)}


def is_patched(kind: type[nn.Module]) -> bool:
    """Whether the forward of a class of torch.nn is another one than when this package was imported."""
    return kind.forward is not _FORWARDS.get(kind, kind.forward)


class Part(NamedTuple):
    """The layer or a submodule as it was when the layer was read: where it is, and what its call depends on.

    children, parameters, attributes: how many it has. settings: its attributes, without those of every nn.Module.
    forward: its class's.
    """

    path: tuple[str, ...]
    kind: type[nn.Module]
    children: int
    parameters: int
    attributes: int
    settings: tuple[tuple[str, object], ...]
    forward: Callable[..., Any]

    @classmethod
    def of(cls, path: tuple[str, ...], kind: type[nn.Module], *others: Any) -> Part:
        return cls(path, kind, *others, _FORWARDS.get(kind, kind.forward))

    def __reduce__(self) -> tuple[Any, ...]:
        return Part.of, self[:-1]  # a forward that has been replaced since has no name to pickle it by

    def __deepcopy__(self, memo: dict[int, Any]) -> Part:
        settings = copy.deepcopy(self.settings, memo)
        return self if settings is self.settings else self._replace(settings=settings)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a layer computes, as arguments of squeeze_excite, with the parts that it depends on.

    kind: the family in words. first, second: paths of the two children with the weights. act, gate, squeeze: as in
        squeeze_excite. form: one of :data:`FORMS`. channels, rd_channels: C and R. channels_last: x is
        [N, *spatial, C]. dimensions: the numbers of spatial dimensions of x that it holds for. argument: the name of
        x in the layer's forward. parts: the layer and its submodules, outermost first.
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
    parts: tuple[Part, ...]

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
        """w1, w2, b1, b2 of the layer; or, as text, why its parts have to be called instead: :func:`plain_weights`."""
        return plain_weights(layer, self.parts, self.first, self.second)

    def mismatch(self, x: Any) -> str | None:
        """Why this input goes to the layer's own forward; None if the recipe holds for it."""
        if type(x) not in _PLAIN_TENSORS:
            if isinstance(x, torch.fx.Proxy):
                if quantising(x):
                    return "FX quantisation is to see its children"
                return None if self.form in ("scale", "residual") else "a gate's shape is not known to FX"
            if not _is_stand_in(x):
                return f"its input is a {type(x).__name__}, not a plain tensor"
        if not torch.jit.is_tracing() and x.numel() == 0 and x.shape[0] != 0:  # which a tracer would warn of
            return "its input has no positions"
        if x.dim() - 2 not in self.dimensions:
            known = " or ".join(str(d + 2) for d in self.dimensions)
            return f"its input has {x.dim()} dimensions; the layer was read for {known}"
        return None

    def apply(
        self, weights: Weights, x: Tensor, *, chosen: str, with_gate: bool = False, backend: str | None = None
    ) -> tuple[Tensor, Any]:
        """What the layer returns for x, and the gate [N, C] if it is wanted (None if not).

        chosen: the backend, from functional.route. backend: the one asked for, where FX is to see squeeze_excite.
        """
        if self.form in ("gate", "flat_gate"):
            gate = excitation(x, *weights, act=self.act, gate=self.gate, squeeze=self.squeeze, backend=chosen)
            y = gate.to(_gate_dtype(x))
            return (y if self.form == "flat_gate" else y[(..., *(None,) * (x.dim() - 2))]), gate
        planes = x.movedim(-1, 1) if self.channels_last else x
        residual = planes if self.form == "residual" else None
        if isinstance(x, torch.fx.Proxy):
            options: dict[str, Any] = {"act": self.act, "gate": self.gate, "squeeze": self.squeeze, "backend": backend}
            y = squeeze_excite(planes, *weights, residual=residual, **options)
            gate = None
        else:
            w1, w2, b1, b2 = weights
            call = Call(
                planes, None, None, None, None, w1, b1, w2, b2, residual, None, 0.0, "", self.act.spec, self.gate.spec,
                self.squeeze, "", "",
            )  # fmt: skip
            y, _, gate, *_ = serve(call, chosen, with_gate)
        return (y.movedim(1, -1) if self.channels_last else y), gate


def plain_weights(
    layer: nn.Module, parts: tuple[Part, ...], first: tuple[str, ...], second: tuple[str, ...]
) -> Weights | str:
    """w1, w2, b1, b2 of an SE layer; or, as text, why its parts have to be called instead.

    A fused layer reads its children's weights and calls no child, so all that could make a child's call differ
    from the bare function of its weights is looked for: another class, hooks, an own forward, another forward of its
    class, a parametrisation, weights that are not plain tensors, attributes. What lies within an attribute (an entry of
    a dict, another module's state) is not seen. Every call of a fused layer comes by here.

    Args:
        layer: the SE layer. parts: it and its submodules, or its submodules alone, as they have to be. first, second:
            paths of the two children with the weights.
    """
    if torch_private.has_global_hooks():
        return "hooks for all modules are registered, and they are to see its children"
    for path, kind, children, parameters, attributes, settings, forward in parts:
        part = layer
        for name in path:
            part = part._modules.get(name)
            if part is None:
                return f"its {'.'.join(path)} has been removed"
        own = part.__dict__
        if path:
            if type(part) is not kind and not _is_wrapped_by_export(part, kind):
                return f"its {'.'.join(path)} was a {kind.__name__} and is a {type(part).__name__}"
            if part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks:
                return f"its {'.'.join(path)} has hooks, which only run if it is called"
            if "forward" in own:
                return f"the forward of its {'.'.join(path)} has been replaced"
            if kind.forward is not forward:
                return f"the forward of {kind.__name__}, which its {'.'.join(path)} is, has been replaced"
        if len(part._modules) != children:
            return f"{_name(path)} had {children} children and has {len(part._modules)}"
        if part._buffers or (len(part._parameters) != parameters and _parameters_of(part) != parameters):
            return f"{_name(path)} has got a parameter or a buffer, or lost one"
        for name, value in settings:
            now = own.get(name, _GONE)
            if now is not value and (type(value) not in SCALARS or now != value):
                return f"{name} of {_name(path)} was {_shown(value)} and has been changed"
        if (_COUNTED_IN_GRAPHS or not torch.compiler.is_compiling()) and len(own) != attributes:
            if (name := _shadowing(own, settings, kind)) is not None:
                return f"{name} of {_name(path)} has been set"
    fc1, fc2 = _at(layer, first), _at(layer, second)
    weights = (_tensor(fc1, "weight"), _tensor(fc2, "weight"), _tensor(fc1, "bias"), _tensor(fc2, "bias"))
    for t in weights:
        if t is not None and type(t) not in _PLAIN_TENSORS and not _is_stand_in(t):
            return f"one of its weights is a {type(t).__name__}, not a plain tensor"
    return weights


def quantising(x: Any) -> bool:
    """Whether x is a proxy of FX quantisation, which quantises modules and knows no fused operator.

    Warns then, once for a model that is traced.
    """
    if not isinstance(x, torch.fx.Proxy) or type(x.tracer).__name__ != "QuantizationTracer":
        return False
    if "_senet_warned" not in vars(x.tracer):
        x.tracer._senet_warned = True
        warnings.warn(_QUANTISED, stacklevel=2)
    return True


_QUANTISED = (
    "FX quantisation sees the children of SE layers, which it quantises, and not the fused operator, which it would "
    "leave in float: the quantised model does not run fused"
)


def _gate_dtype(x: Tensor) -> torch.dtype:
    """The dtype that PyTorch's own operators give a gate: x's, or autocast's."""
    kind = x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return x.dtype
    return torch.get_autocast_dtype(kind)


OWN_ATTRIBUTES = ("_senet_fused", "_senet_captured")  # what fuse adds to a layer's
_OF_EVERY_MODULE = frozenset((*vars(nn.Module()), *OWN_ATTRIBUTES, "inplace", "forward"))
_OF_CONVOLUTIONS = ("kernel_size", "stride", "padding", "groups")
SCALARS = (bool, int, float, str, tuple)
_GONE = object()
# Dynamo cannot count a module's attributes in torch 2.11. Without a backend by name the original runs there anyway.
_COUNTED_IN_GRAPHS = torch.__version__ >= (2, 13)


def parts_of(layer: nn.Module) -> tuple[Part, ...]:
    """The layer and its submodules, outermost first."""
    return tuple(
        Part.of(
            tuple(name.split(".")) if name else (),
            type(module),
            len(module._modules),
            len(module._parameters),
            len(vars(module).keys() - OWN_ATTRIBUTES) + (0 if name else len(OWN_ATTRIBUTES)),
            settings_of(module),
        )
        for name, module in layer.named_modules(remove_duplicate=False)
    )


def settings_of(module: nn.Module) -> tuple[tuple[str, object], ...]:
    """A module's attributes without those that every module has: a slope, a pooling's output size, a function."""
    if type(module) is nn.Linear:
        return ()  # its weight says it all
    if type(module) in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
        return tuple((name, getattr(module, name)) for name in _OF_CONVOLUTIONS)
    return tuple((name, value) for name, value in vars(module).items() if name not in _OF_EVERY_MODULE)


def _shadowing(own: dict[str, Any], settings: tuple[tuple[str, object], ...], kind: type[nn.Module]) -> str | None:
    """A public attribute that has been set since in the place of its class's, such as a default; None if there is none.

    Attributes that the class does not have either are somebody's notes, which its forward does not read.
    """
    known = {name for name, _ in settings}
    for name in own:
        if name not in known and name[0] != "_" and name not in _OF_EVERY_MODULE and hasattr(kind, name):
            return name
    return None


def _shown(value: object) -> str:
    return repr(value) if type(value) in SCALARS else f"a {type(value).__name__}"


def _name(path: tuple[str, ...]) -> str:
    return f"its {'.'.join(path)}" if path else "it"


def _at(layer: nn.Module, path: tuple[str, ...]) -> nn.Module:
    for name in path:
        layer = layer._modules[name]
    return layer


def _parameters_of(part: nn.Module) -> int:
    """How many parameters a part has; weight and bias may be plain attributes, as FSDP1 and DataParallel keep them."""
    return len(part._parameters) + sum(isinstance(part.__dict__.get(name), Tensor) for name in ("weight", "bias"))


def _tensor(part: nn.Module, name: str) -> Any:
    """part's weight or bias; a plain attribute where something keeps the parameter elsewhere (see _parameters_of)."""
    own = part._parameters
    return own[name] if name in own else getattr(part, name)


def _is_wrapped_by_export(part: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether torch.export has put part in a module's place while it traces: of a subclass with the same name."""
    return torch.compiler.is_exporting() and isinstance(part, kind) and type(part).__name__ == kind.__name__


def _is_stand_in(t: object) -> bool:
    """Whether t stands for a plain tensor while somebody traces: FX's proxies, fake and functional tensors."""
    return isinstance(t, (torch.fx.Proxy, *torch_private.stand_ins))
