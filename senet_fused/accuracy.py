"""The error rule: how far a result may be from float64. Used by tests, ``bench`` and ``doctor``.

The error of a tensor is max |found - exact| / max |exact|. It may be at most the larger of

* (a) twice stock PyTorch's error, and
* (b) four times what rounding alone does to the result,

plus one unit in the last place of the tensor's own dtype, its one rounding where it is 16-bit.

(a) alone is not enough: stock's error is sometimes nearly zero, by chance or because a BLAS sums more exactly than
others, and then no other implementation could pass. (b) is a property of the mathematics and the inputs, the same on
every machine. Plain PyTorch computes in float64, but every operation gets its inputs moved at random by up to one unit
in the last place of the accumulation dtype (Monte Carlo arithmetic: Parker, Pierce & Eggert 2000, "Monte Carlo
arithmetic: how to gamble with your floating point"), and the addends of a sum of n by up to sqrt(n) units, for the
partial sums that are rounded on the way: an algorithm whose steps are backward stable computes just such results
(Higham 2002, "Accuracy and stability of numerical algorithms", sections 1.5 and 4.2), whatever the order of its sums,
with fused multiply-adds or without. So a sum is measured by the size of its *addends*. Where it cancels, as the
gradients in front of a BatchNorm do, the result is small, and no implementation could meet a bound relative to it.

What this does not allow: a 16-bit accumulator, a variance by E[x^2] - E[x]^2, an element or a sample that is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .torch_private import DispatchMode

__all__ = ["Rounding", "refused", "relative_error"]

_STOCK, _ROUNDING = 2, 4
_DRAWS = 8  # one draw may move a tensor of one element by almost nothing


def relative_error(found: Tensor, exact: Tensor) -> float:
    """max |found - exact| / max |exact|; infinite for NaN, and for a difference where all of exact is zero."""
    if exact.numel() == 0:
        return 0.0
    exact = exact.double()
    difference = (found.detach().double() - exact).abs().max().item()
    scale = exact.abs().max().item()
    if difference != difference:
        return math.inf
    return difference / scale if scale else (math.inf if difference else 0.0)


def refused(
    found: Mapping[str, Tensor],
    exact: Mapping[str, Tensor],
    stock: Mapping[str, float],
    plain: Callable[[], Mapping[str, Tensor]],
    accumulation: torch.dtype,
    slack: float = 1.0,
) -> dict[str, str]:
    """The tensors that the rule refuses, each with its error and its limit.

    Args:
        found: the tensors under test, in the dtypes that they are stored in. exact: the same in float64.
        stock: :func:`relative_error` of stock PyTorch's tensors; a name that is missing counts as zero.
        plain: computes the tensors of ``found`` in float64 by plain PyTorch, the same each time. Called only if (a)
            alone does not accept the error.
        accumulation: the dtype of sums and of what lies between two operations.
        slack: a factor of the limit.
    """

    def excessive(moved: Mapping[str, float]) -> dict[str, str]:
        wrong = {}
        for name, error in errors.items():
            most = max(_STOCK * stock.get(name, 0.0), _ROUNDING * moved.get(name, 0.0))
            most = slack * (most + units[name])
            if not error <= most:
                wrong[name] = f"is off by {error:.1e}, allowed {most:.1e}"
        return wrong

    errors = {name: relative_error(found[name], exact[name]) for name in found}
    units = {name: _last_place(found[name].dtype, exact[name]) for name in found}
    moved: dict[str, float] = {}
    wrong = excessive(moved)
    if not wrong:
        return wrong
    still = plain()
    for seed in range(_DRAWS):
        with Rounding(accumulation, seed):
            rounded = plain()
        for name in wrong:
            moved[name] = max(moved.get(name, 0.0), relative_error(rounded[name], still[name]))
        wrong = excessive(moved)
        if not wrong:
            break
    return wrong


def _last_place(dtype: torch.dtype, exact: Tensor) -> float:
    """One unit in the last place of the largest value, relative to it: more than eps where it is subnormal."""
    facts, scale = torch.finfo(dtype), exact.abs().max().item() if exact.numel() else 0.0
    return facts.eps * max(1.0, facts.tiny / scale if scale else 1.0)


class Rounding(DispatchMode):
    """Moves the floating-point inputs of every operation at random, by the amounts of this module's rule."""

    def __init__(self, dtype: torch.dtype, seed: int = 0) -> None:
        super().__init__()
        self.unit = torch.finfo(dtype).eps
        self.seed = seed
        self.generators: dict[torch.device, torch.Generator] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _IN_STEPS:
            with self:
                return _IN_STEPS[func](*args, **kwargs)
        if not _computes(func):
            return func(*args, **kwargs)
        reach = self.unit * math.sqrt(_terms(func, args))
        arguments = zip(func._schema.arguments, args, strict=False)
        moved = [arg if a.alias_info else self._move(arg, reach) for a, arg in arguments]
        return func(*moved, **kwargs)

    def _move(self, t: Any, reach: float) -> Any:
        if isinstance(t, list):  # of tensors, as torch.cat has, or of numbers
            return [self._move(one, reach) for one in t]
        if not isinstance(t, Tensor) or not t.is_floating_point():
            return t
        if t.device not in self.generators:
            self.generators[t.device] = torch.Generator(t.device).manual_seed(self.seed)
        return t + t * torch.empty_like(t).uniform_(-reach, reach, generator=self.generators[t.device])


aten = torch.ops.aten
# A maximum equals one of its inputs, and a later comparison has to find that input.
_EXACT = {aten.amax, aten.amin, aten.eq, aten.clone, aten._to_copy, aten.copy_}


def _computes(func: Any) -> bool:
    """Whether the operation computes, rather than returning a view, a copy or one of its inputs."""
    view = any(a.alias_info is not None and not a.alias_info.is_write for a in func._schema.arguments)
    return not view and func.overloadpacket not in _EXACT


def _terms(func: Any, args: tuple[Any, ...]) -> int:
    """How many addends an element of the operation's result has; 1 for operations that add a few at most."""
    kind = func.overloadpacket
    if kind in (aten.sum, aten.mean):
        dims = args[1] if len(args) > 1 and args[1] else range(args[0].dim())
        return math.prod(args[0].shape[d] for d in dims)
    if kind in (aten.mm, aten.bmm, aten.addmm):
        return args[-1].shape[-2]
    if kind is aten.convolution:
        return args[1].numel() // args[1].shape[0]
    if kind is aten.convolution_backward:
        return args[0].numel() // args[0].shape[1]
    return 1


def _batch_norm(x, weight, bias, running_mean, running_var, training, momentum, eps):
    """A mean is rounded before it is subtracted, in the same way for a whole channel."""
    sums, count = [0, *range(2, x.dim())], x.numel() / x.shape[1]
    wide = [1, -1, *(1 for _ in x.shape[2:])]
    mean = x.mean(sums) if training else running_mean
    centred = x - mean.reshape(wide)
    var = (centred * centred).mean(sums) if training else running_var
    rstd = (var + eps).rsqrt()
    y = centred * (rstd if weight is None else rstd * weight).reshape(wide)
    if training and running_mean is not None:
        for running, now in ((running_mean, mean), (running_var, var * (count / (count - 1)))):
            running.copy_((1 - momentum) * running + momentum * now)
    y = y if bias is None else y + bias.reshape(wide)
    return (y, mean, rstd) if training else (y, x.new_empty(0), x.new_empty(0))


def _batch_norm_backward(g, x, weight, running_mean, running_var, mean, rstd, training, eps, wanted):
    sums, count = [0, *range(2, x.dim())], x.numel() / x.shape[1]
    wide = [1, -1, *(1 for _ in x.shape[2:])]
    if not training:
        mean, rstd = running_mean, (running_var + eps).rsqrt()
    xhat = (x - mean.reshape(wide)) * rstd.reshape(wide)
    dbias, dweight = g.sum(sums), (g * xhat).sum(sums)
    if training:
        g = g - (dbias / count).reshape(wide) - xhat * (dweight / count).reshape(wide)
    dx = g * (rstd if weight is None else rstd * weight).reshape(wide)
    return tuple(t if w else None for t, w in zip((dx, dweight, dbias), wanted, strict=True))


def _gelu(v, approximate="none"):
    """1 + erf cancels for negative arguments, and all that is left is rounding."""
    return v * _gelu_factor(v, approximate)[0]


def _gelu_backward(g, v, approximate="none"):
    factor, slope = _gelu_factor(v, approximate)
    return g * (factor + v * slope)


def _gelu_factor(v, approximate):
    """(1 + f) / 2 and its derivative, f = erf(v / sqrt(2)) or its approximation."""
    if approximate == "none":
        f, slope = torch.erf(v * math.sqrt(0.5)), torch.exp(-0.5 * (v * v)) * math.sqrt(2 / math.pi)
    else:
        scale = math.sqrt(2 / math.pi)
        f = torch.tanh(scale * (v + 0.044715 * (v * v * v)))
        slope = (1 - f * f) * (scale * (1 + 3 * 0.044715 * (v * v)))
    return 0.5 * (1 + f), 0.5 * slope


# Of more than one step, or more than one sum.
_IN_STEPS = {
    aten.native_batch_norm.default: _batch_norm,
    aten.native_batch_norm_backward.default: _batch_norm_backward,
    aten.gelu.default: _gelu,
    aten.gelu_backward.default: _gelu_backward,
}
