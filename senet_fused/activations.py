"""The elementwise functions of an SE layer, under one name in Python, C++, CUDA and Triton.

``act`` sits between the two fully connected layers, ``gate`` after the second one. Every backend reads an
:class:`Activation` as its canonical text (:attr:`Activation.spec`), which is also what an exported graph shows.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["ACT_NAMES", "GATE_NAMES", "Activation"]

ACT_NAMES = (
    "identity", "relu", "relu6", "leaky_relu", "silu", "gelu", "hardswish", "mish", "tanh", "sigmoid",
)  # fmt: skip
# A gate's derivative is taken from the gate itself, which is saved anyway; these five allow that.
GATE_NAMES = ("sigmoid", "hardsigmoid", "tanh", "relu", "identity")

_DEFAULTS: dict[str, dict[str, object]] = {
    "leaky_relu": {"negative_slope": 0.01},
    "gelu": {"approximate": "none"},
    "hardsigmoid": {"slope": 1 / 6, "offset": 0.5},
}
_ALIASES = {"swish": "silu", "hard_sigmoid": "hardsigmoid", "hard_swish": "hardswish", "linear": "identity"}
_MODULES: dict[type[nn.Module], str] = {
    nn.Identity: "identity",
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.LeakyReLU: "leaky_relu",
    nn.SiLU: "silu",
    nn.GELU: "gelu",
    nn.Hardswish: "hardswish",
    nn.Mish: "mish",
    nn.Tanh: "tanh",
    nn.Sigmoid: "sigmoid",
    nn.Hardsigmoid: "hardsigmoid",
}


class Activation:
    """An elementwise function by name, with its parameters; immutable, hashable and picklable.

    Args:
        name: one of :data:`ACT_NAMES` or :data:`GATE_NAMES`.
        **parameters: ``negative_slope`` for leaky_relu (default 0.01), ``approximate`` ("none" or "tanh") for gelu,
            ``slope`` and ``offset`` for hardsigmoid, ``clamp(slope * v + offset, 0, 1)`` (defaults 1/6 and 0.5,
            PyTorch's; PaddlePaddle's slope is 0.2).

    Raises:
        ValueError: an unknown name, an unknown parameter or a parameter that is not a finite number.

    >>> Activation("hardsigmoid", slope=0.2).spec
    'hardsigmoid(0.2, 0.5)'
    """

    __slots__ = ("_args", "_name", "_spec")
    _name: str
    _args: tuple[float, ...]
    _spec: str

    def __init__(self, name: str, **parameters: object) -> None:
        name = _ALIASES.get(name, name)
        if name not in _KERNEL_CODES or name == "gelu_tanh":
            raise ValueError(f"unknown activation {name!r}; known: {', '.join(sorted({*ACT_NAMES, *GATE_NAMES}))}")
        defaults = _DEFAULTS.get(name, {})
        unknown = sorted(set(parameters) - set(defaults))
        if unknown:
            takes = ", ".join(defaults) or "none"
            raise ValueError(f"activation {name!r} has no parameter {', '.join(unknown)}; it takes: {takes}")
        values = {**defaults, **parameters}
        if name == "gelu":
            if values["approximate"] not in ("none", "tanh"):
                raise ValueError(f"gelu: approximate must be 'none' or 'tanh', got {values['approximate']!r}")
            self._set("gelu_tanh" if values["approximate"] == "tanh" else "gelu", ())
            return
        args = []
        for key, value in values.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < float("inf"):
                raise ValueError(f"activation {name!r}: {key} must be a finite number, got {value!r}")
            args.append(float(value))
        self._set(name, tuple(args))

    def _set(self, kernel_name: str, args: tuple[float, ...]) -> None:
        spec = f"{kernel_name}({', '.join(map(repr, args))})" if args else kernel_name
        for key, value in (("_name", kernel_name), ("_args", args), ("_spec", spec)):
            object.__setattr__(self, key, value)

    def __setattr__(self, key: str, value: object) -> None:
        raise AttributeError("an Activation cannot be changed; make a new one")

    @property
    def name(self) -> str:
        """The function's name without parameters, e.g. ``"leaky_relu"``."""
        return "gelu" if self._name == "gelu_tanh" else self._name

    @property
    def spec(self) -> str:
        """The canonical text, e.g. ``"relu"`` or ``"leaky_relu(0.1)"``; :meth:`parse` reads it back exactly."""
        return self._spec

    @property
    def kernel_name(self) -> str:
        """The name kernels know: as :attr:`name`, but ``"gelu_tanh"`` for gelu with ``approximate="tanh"``."""
        return self._name

    @property
    def code(self) -> int:
        """The number compiled kernels know the function by (``csrc/plan/plan.h`` holds the same list)."""
        return _KERNEL_CODES[self._name]

    @property
    def args(self) -> tuple[float, ...]:
        """The function's numeric parameters in the order of :attr:`spec`; empty for most."""
        return self._args

    def __repr__(self) -> str:
        return f"Activation({self._spec!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Activation) and other._spec == self._spec

    def __hash__(self) -> int:
        return hash(self._spec)

    def __reduce__(self) -> tuple[Callable[[str], Activation], tuple[str]]:
        return Activation.parse, (self._spec,)

    def __deepcopy__(self, memo: object) -> Activation:
        return self

    @staticmethod
    def parse(spec: str) -> Activation:
        """Reads :attr:`spec` back. Raises ValueError for any other text."""
        read = _read if torch.compiler.is_compiling() else _parse  # torch.compile warns of a cached function
        return _BY_NAME.get(spec) or read(spec)

    @staticmethod
    def of(function: str | Activation | nn.Module | type[nn.Module]) -> Activation:
        """The Activation meant by a name, a torch.nn module (class or instance) or an Activation.

        Raises:
            ValueError: an unknown name, or a module that is none of torch.nn's own.
            TypeError: anything else.
        """
        if isinstance(function, Activation):
            return function
        if isinstance(function, str):
            return Activation.parse(function)
        if isinstance(function, type) and issubclass(function, nn.Module):
            if function not in _MODULES:
                raise ValueError(_unknown_module(function))
            return Activation(_MODULES[function])
        if isinstance(function, nn.Module):
            name = _MODULES.get(type(function))
            if name is None:
                raise ValueError(_unknown_module(type(function)))
            keys = {"leaky_relu": ("negative_slope",), "gelu": ("approximate",)}.get(name, ())
            return Activation(name, **{key: getattr(function, key) for key in keys})
        raise TypeError(
            "an activation is a name, a torch.nn module (class or instance) or senet_fused.Activation; "
            f"got {type(function).__name__}"
        )

    def __call__(self, v: Tensor) -> Tensor:
        """The function of a tensor of any shape, in plain PyTorch (differentiable to any order)."""
        return _FORWARD[self._name](v, *self._args)

    def derivative(self, v: Tensor) -> Tensor:
        """d function / d v at v, same shape, in plain PyTorch; kinks as PyTorch's own backward takes them."""
        return _DERIVATIVE[self._name](v, *self._args)

    def derivative_from_output(self, out: Tensor) -> Tensor:
        """d function / d v from the function's value; for the names in :data:`GATE_NAMES` only."""
        return _DERIVATIVE_FROM_OUTPUT[self._name](out, *self._args)


def _unknown_module(kind: type) -> str:
    known = ", ".join(f"nn.{k.__name__}" for k in _MODULES)
    return (
        f"{kind.__module__}.{kind.__qualname__} is not an activation known here (known: {known}); "
        "pass a name or senet_fused.Activation"
    )


def _read(spec: str) -> Activation:
    # Without a regular expression: torch.compile traces this, and re's own compiler breaks the graph in torch 2.11.
    name, bracket, texts = spec.strip().partition("(")
    name, inside = name.strip(), texts.removesuffix(")")
    if not name.replace("_", "a").isalnum() or bool(bracket) != texts.endswith(")") or "(" in inside or ")" in inside:
        raise ValueError(f"cannot read the activation {spec!r}; write a name such as 'relu' or 'leaky_relu(0.1)'")
    name = _ALIASES.get(name, name)
    parameters: dict[str, Any] = {}
    if name == "gelu_tanh":
        name, parameters["approximate"] = "gelu", "tanh"
    if inside.strip():
        keys = list(_DEFAULTS.get(name, {})) if name != "gelu" else []
        numbers = inside.split(",")
        if len(numbers) > len(keys):
            raise ValueError(f"activation {spec!r}: {name} takes {len(keys)} parameter(s), got {len(numbers)}")
        try:
            parameters = dict(zip(keys, map(float, numbers), strict=False))
        except ValueError:
            raise ValueError(f"activation {spec!r}: parameters must be numbers") from None
    return Activation(name, **parameters)


_parse = lru_cache(maxsize=256)(_read)

# The order is the compiled kernels' enum Function in csrc/plan/plan.h.
_KERNEL_CODES = {
    name: code
    for code, name in enumerate(
        (
            "identity", "relu", "relu6", "leaky_relu", "silu", "gelu", "gelu_tanh", "hardswish", "mish", "tanh",
            "sigmoid", "hardsigmoid",
        )
    )
}  # fmt: skip

_BY_NAME = {name: Activation(name) for name in (*_KERNEL_CODES, *_ALIASES) if name != "gelu_tanh"}

_SQRT_HALF = 0.5**0.5
_INV_SQRT_2PI = 0.3989422804014327
_GELU_TANH_A, _GELU_TANH_B = 0.7978845608028654, 0.044715  # sqrt(2 / pi), Hendrycks & Gimpel 2016


def _d_sigmoid(v: Tensor) -> Tensor:
    s = torch.sigmoid(v)
    return s * (1 - s)


def _d_silu(v: Tensor) -> Tensor:
    s = torch.sigmoid(v)
    return s * (1 + v * (1 - s))


def _d_gelu(v: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf(v * _SQRT_HALF)) + v * torch.exp(-0.5 * v * v) * _INV_SQRT_2PI


def _d_gelu_tanh(v: Tensor) -> Tensor:
    t = torch.tanh(_GELU_TANH_A * (v + _GELU_TANH_B * v**3))
    return 0.5 * (1 + t) + 0.5 * v * (1 - t * t) * _GELU_TANH_A * (1 + 3 * _GELU_TANH_B * v * v)


def _d_mish(v: Tensor) -> Tensor:
    t = torch.tanh(F.softplus(v))
    return t + v * (1 - t * t) * torch.sigmoid(v)


def _d_hardswish(v: Tensor) -> Tensor:
    return torch.where(v <= -3, torch.zeros_like(v), torch.where(v >= 3, torch.ones_like(v), v / 3 + 0.5))


def _hardsigmoid(v: Tensor, slope: float, offset: float) -> Tensor:
    v = slope * v + offset
    return torch.where((v > 0) & (v < 1), v, v.detach().clamp(0, 1))  # flat at its corners, as F.hardsigmoid is


def _d_hardsigmoid(v: Tensor, slope: float, offset: float) -> Tensor:
    return _d_hardsigmoid_from_output(_hardsigmoid(v, slope, offset), slope, offset)


def _d_hardsigmoid_from_output(out: Tensor, slope: float, offset: float) -> Tensor:
    return ((out > 0) & (out < 1)).to(out.dtype) * slope


def _d_relu(v: Tensor) -> Tensor:
    return (~(v <= 0)).to(v.dtype)  # NaN passes, as in torch's threshold_backward


_FORWARD: dict[str, Callable[..., Tensor]] = {
    "identity": lambda v: v,
    "relu": torch.relu,
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda v: F.gelu(v, approximate="tanh"),
    "hardswish": F.hardswish,
    "mish": F.mish,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "hardsigmoid": _hardsigmoid,
}
_DERIVATIVE: dict[str, Callable[..., Tensor]] = {
    "identity": torch.ones_like,
    "relu": _d_relu,
    "relu6": lambda v: (~((v <= 0) | (v >= 6))).to(v.dtype),
    "leaky_relu": lambda v, slope: torch.where(v > 0, torch.ones_like(v), torch.full_like(v, slope)),
    "silu": _d_silu,
    "gelu": _d_gelu,
    "gelu_tanh": _d_gelu_tanh,
    "hardswish": _d_hardswish,
    "mish": _d_mish,
    "tanh": lambda v: 1 - torch.tanh(v) ** 2,
    "sigmoid": _d_sigmoid,
    "hardsigmoid": _d_hardsigmoid,
}
_DERIVATIVE_FROM_OUTPUT: dict[str, Callable[..., Tensor]] = {
    "identity": torch.ones_like,
    "relu": _d_relu,
    "tanh": lambda out: 1 - out * out,
    "sigmoid": lambda out: out * (1 - out),
    "hardsigmoid": _d_hardsigmoid_from_output,
}
