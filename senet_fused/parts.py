"""The parts of an SE layer, ours or somebody's, as they were when it was read, and whether they still are so.

An operator in a layer's place reads the weights of the layer's children and calls none of them: it may only run while
that makes no difference.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import torch_private

__all__ = [
    "OWN_ATTRIBUTES", "PLAIN_TENSORS", "Part", "Weights", "has_hooks", "is_patched", "is_stand_in", "parts_of",
    "quantising", "settings_of", "weights_or_reason",
]  # fmt: skip

# Exactly these: a subclass may compute something else, and a subclass of Tensor may not hold the numbers it stands for.
PLAIN_TENSORS = (Tensor, nn.Parameter)

Weights = tuple[Tensor, Tensor, "Tensor | None", "Tensor | None"]

# Of PyTorch's own classes, before anybody replaces one for all modules, as kernel libraries do.
_FORWARDS = {kind: kind.forward for kind in vars(nn).values() if isinstance(kind, type) and issubclass(kind, nn.Module)}


def is_patched(kind: type[nn.Module]) -> bool:
    """Whether the forward of a class of torch.nn is another one than when this package was imported."""
    return kind.forward is not _FORWARDS.get(kind, kind.forward)


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module would run more than its class's forward, or something else.

    A class of torch.nn whose forward has been replaced, for all its modules, is something else.
    """
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or is_patched(type(module))
    )


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


def weights_or_reason(
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
            if now is not value and (type(value) not in _SCALARS or now != value):
                return f"{name} of {_name(path)} was {_shown(value)} and has been changed"
        if (_COUNTED_IN_GRAPHS or not torch.compiler.is_compiling()) and len(own) != attributes:
            if (name := _shadowing(own, settings, kind)) is not None:
                return f"{name} of {_name(path)} has been set"
    fc1, fc2 = _at(layer, first), _at(layer, second)
    weights = (_tensor(fc1, "weight"), _tensor(fc2, "weight"), _tensor(fc1, "bias"), _tensor(fc2, "bias"))
    for t in weights:
        if t is not None and type(t) not in PLAIN_TENSORS and not is_stand_in(t):
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


OWN_ATTRIBUTES = ("_senet_fused", "_senet_captured")  # what fuse adds to a layer's
_IN_EVERY_MODULE = frozenset((*vars(nn.Module()), *OWN_ATTRIBUTES, "inplace", "forward"))
_OF_CONVOLUTIONS = ("kernel_size", "stride", "padding", "groups")
_SCALARS = (bool, int, float, str, tuple)
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
    return tuple((name, value) for name, value in vars(module).items() if name not in _IN_EVERY_MODULE)


def _shadowing(own: dict[str, Any], settings: tuple[tuple[str, object], ...], kind: type[nn.Module]) -> str | None:
    """A public attribute that has been set since in the place of its class's, such as a default; None if there is none.

    Attributes that the class does not have either are somebody's notes, which its forward does not read.
    """
    known = {name for name, _ in settings}
    for name in own:
        if name not in known and name[0] != "_" and name not in _IN_EVERY_MODULE and hasattr(kind, name):
            return name
    return None


def _shown(value: object) -> str:
    return repr(value) if type(value) in _SCALARS else f"a {type(value).__name__}"


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


def is_stand_in(t: object) -> bool:
    """Whether t stands for a plain tensor while somebody traces: FX's proxies, fake and functional tensors."""
    return isinstance(t, (torch.fx.Proxy, *torch_private.stand_ins))
