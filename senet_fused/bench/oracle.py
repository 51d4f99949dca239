"""Correctness gates timing: the float64 oracle, and senet_fused.accuracy's rule for what providers compute."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..accuracy import refused, relative_error
from .problems import Case

__all__ = [
    "FUNCTIONS", "PARAMETERS", "InputSet", "Verdict", "Weights", "in_double", "judge", "norm_dtype", "oracle",
    "oracle_branch", "oracle_gate", "stock_errors",
]  # fmt: skip


class InputSet(NamedTuple):
    """What one call reads: x, the residual or None, and dy or None (forward only)."""

    x: Tensor
    residual: Tensor | None
    dy: Tensor | None


class Weights(NamedTuple):
    """w1 [R, C], b1 [R] or None, w2 [C, R], b2 [C] or None, in the dtype of the case.

    weight, bias: a tail's BatchNorm's, mean, var: its running statistics; all [C], in :func:`norm_dtype`.
    """

    w1: Tensor
    b1: Tensor | None
    w2: Tensor
    b2: Tensor | None
    weight: Tensor | None = None
    bias: Tensor | None = None
    mean: Tensor | None = None
    var: Tensor | None = None


# By their names in a Case.
FUNCTIONS: dict[str, type[nn.Module]] = {
    "identity": nn.Identity,
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "leaky_relu": nn.LeakyReLU,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "hardswish": nn.Hardswish,
    "mish": nn.Mish,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "hardsigmoid": nn.Hardsigmoid,
}

# Others are judged by stock's error, so it is limited itself: the largest relative error per tensor.
_STOCK_LIMIT = {"float64": 1e-9, "float32": 1e-3, "float16": 0.05, "bfloat16": 0.1}
PARAMETERS = ("w1", "b1", "w2", "b2", "weight", "bias")
# What is in norm_dtype instead of the case's dtype.
_OF_NORM = ("dweight", "dbias", "running_mean", "running_var")


def norm_dtype(case: Case) -> torch.dtype:
    """Of BatchNorm's parameters and statistics: float32, as networks keep them, float64 for that."""
    return torch.float64 if case.dtype == "float64" else torch.float32


def in_double(weights: Weights) -> Weights:
    """Copies in float64."""
    return Weights(*(None if w is None else w.detach().to(torch.float64, copy=True) for w in weights))


def oracle_gate(case: Case, x: Tensor, weights: Weights) -> Tensor:
    """The gate in float64, as [N, C, 1, ...]; differentiable with respect to x and the weights."""
    w1, b1, w2, b2 = (None if w is None else w.double() for w in weights[:4])
    pooled = x.double().mean(tuple(range(2, x.dim())))
    hidden = FUNCTIONS[case.act]()(F.linear(pooled, w1, b1))
    gate = FUNCTIONS[case.gate]()(F.linear(hidden, w2, b2))
    return gate.reshape(*gate.shape, *[1] * (x.dim() - 2))


def oracle_branch(case: Case, x: Tensor, weights: Weights) -> Tensor:
    """What the residual is added to, in float64. A tail's training updates weights.mean and var, as BatchNorm does."""
    x = x.double()
    if case.op == "tail":
        x = F.batch_norm(x, weights.mean, weights.var, weights.weight, weights.bias, case.training)
    return oracle_gate(case, x, weights) * x


def oracle(case: Case, inputs: InputSet, weights: Weights) -> dict[str, Tensor]:
    """y and every gradient in float64 by autograd through plain PyTorch, from the values in the case's dtype.

    Keys: y, dx, dresidual (with a residual), dw1, db1, dw2, db2 (biases if there are any); of a tail dweight, dbias,
    and what the running statistics are afterwards, running_mean and running_var.
    """
    x = inputs.x.detach().double().requires_grad_()
    residual = None if inputs.residual is None else inputs.residual.detach().double().requires_grad_()
    double = in_double(weights)
    for w in double[:6]:
        if w is not None:
            w.requires_grad_()
    y = oracle_branch(case, x, double)
    if residual is not None:
        y = y + residual
    if case.post_act == "relu":
        y = F.relu(y)
    w = double._asdict()
    wanted = {"dx": x, "dresidual": residual} | {f"d{name}": w[name] for name in PARAMETERS}
    wanted = {name: tensor for name, tensor in wanted.items() if tensor is not None}
    gradients = torch.autograd.grad(y, list(wanted.values()), inputs.dy.double())
    exact = {"y": y.detach(), **dict(zip(wanted, gradients, strict=True))}
    return exact if case.op == "se" else exact | {"running_mean": double.mean, "running_var": double.var}


class Verdict(NamedTuple):
    """The largest error of all tensors (infinite for NaN or a missing one), and what is wrong, or None."""

    max_error: float
    wrong: str | None


def stock_errors(case: Case, runs: Sequence[dict[str, float]]) -> dict[str, float]:
    """Stock PyTorch's error per tensor: the largest of several runs of the stock layer.

    Several, because a tensor of a few elements can be exact by chance, and would then allow no error at all.

    Raises:
        RuntimeError: stock itself is off by far more than rounding explains.
    """
    errors = {name: max(run[name] for run in runs) for name in runs[0]}
    for name, error in errors.items():
        if not error <= _STOCK_LIMIT[case.dtype]:
            raise RuntimeError(f"stock PyTorch's {name} is off by {error:.1e} from float64: no baseline to judge by")
    return errors


def judge(
    case: Case,
    results: dict[str, Tensor],
    exact: dict[str, Tensor],
    stock_errors: dict[str, float],
    plain: Callable[[], dict[str, Tensor]],
    ours: bool,
) -> Verdict:
    """Compares a provider's tensors with the oracle's.

    Args:
        results: y and running statistics, or those and every gradient, by the oracle's names.
        stock_errors: of :func:`stock_errors`.
        plain: computes ``exact`` again.
        ours: whether :mod:`senet_fused.accuracy`'s rule holds as it is. Others are not held to it (torch.compile
            sums channels_last planes less accurately than stock does); they may be off by eight times as much, which
            is still far from anything computed wrongly.
    """
    found = {}
    for name in exact:
        if name.startswith("d") and not case.backward:
            continue
        dtype = norm_dtype(case) if name in _OF_NORM else getattr(torch, case.dtype)
        if name not in results:
            return Verdict(math.inf, f"wrong output: {name} is missing")
        found[name], wanted = results[name], exact[name]
        if found[name].shape != wanted.shape or found[name].dtype != dtype:
            text = f"{list(found[name].shape)} {found[name].dtype}, expected {list(wanted.shape)} {dtype}"
            return Verdict(math.inf, f"wrong output: {name} is {text}")
    # Running statistics have norm_dtype, as sums have.
    wrong = refused(found, exact, stock_errors, plain, norm_dtype(case), slack=1 if ours else 8)
    worst = max(relative_error(tensor, exact[name]) for name, tensor in found.items())
    complaints = "; ".join(f"{name} {text}" for name, text in wrong.items())
    return Verdict(worst, f"wrong output: {complaints}" if wrong else None)
