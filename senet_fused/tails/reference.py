r"""Block tails in plain PyTorch: BatchNorm -> SE -> + residual -> ReLU, the definition that kernels are held against.

x is what BatchNorm gets, [N, C, *spatial] with M spatial positions p; m = N * M. weight and bias are BatchNorm's; f[n]
is an optional factor of each sample's branch (stochastic depth: Huang et al. 2016). act, gate_fn, w1, b1, w2, b2, (E2)
and (E3) are those of :mod:`senet_fused.reference`. Without w1 there is no gate: BatchNorm -> + residual -> ReLU, and
gate[n,c] = 1.

BatchNorm (Ioffe & Szegedy 2015, algorithm 1) is affine in x and a mean is linear, so the squeeze of BatchNorm's output
follows from the means of x. Forward, with xbar[n,c] = mean_p x and M2[n,c] = sum_p (x - xbar)^2::

    (T1) mu[c] = mean_n xbar[n,c];  var[c] = sum_n (M2[n,c] + M * (xbar[n,c] - mu[c])^2) / m;  rstd = (var + eps)^-1/2
    (T2) pooled[n,c] = weight * rstd * (xbar[n,c] - mu) + bias;  (E2), (E3) give gate[n,c]
    (T3) y = post_act(A[n,c] * (x - mu) + D[n,c] + residual),  A = f * gate * weight * rstd,  D = f * gate * bias

Backward, with g = dy where post_act lets it through, dresidual = g, xhat = rstd * (x - mu)::

    (T4) G0[n,c] = f * sum_p g,  G1[n,c] = f * sum_p g * xhat
    (T5) dgate = weight * G1 + bias * G0;  (B3) to (B5), (B7) of the SE layer give dpooled and the SE weights' gradients
    (T6) dweight[c] = sum_n (gate * G1 + dpooled / M * sum_p xhat),  dbias[c] = sum_n (gate * G0 + dpooled)
    (T7) dx = A * g + Q[c] * (x - mu) + T[n,c],
         Q = -weight * rstd^2 * dweight / m,  T = weight * rstd * (dpooled / M - dbias / m)

(T4) to (T6) are the product and chain rules on (T3), (T2). In (T7) the first term and dpooled's are x's own; the others
are BatchNorm's: mu and var depend on every x, and what reaches them is a multiple of dbias and dweight. With statistics
that are given (evaluation) they are constants: Q = 0, and T = weight * rstd * dpooled / M.

Synchronised BatchNorm is the same with m, mu, var in (T1) and m, dweight, dbias in (T7) those of all processes.

x - mu stays together in (T3), (T4) and (T7): mu folded into the constants would cancel. Sums, and everything between
the sweeps over x, are float32 (float64 for float64 x).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..activations import Activation

__all__ = ["TailGradients", "block_tail", "block_tail_backward"]


class TailGradients(NamedTuple):
    """Gradients of :func:`block_tail`, each in its input's shape and dtype; None where there was no input."""

    dx: Tensor
    dweight: Tensor | None
    dbias: Tensor | None
    dw1: Tensor | None
    db1: Tensor | None
    dw2: Tensor | None
    db2: Tensor | None
    dresidual: Tensor | None


def block_tail(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    mean: Tensor | None = None,
    var: Tensor | None = None,
    w1: Tensor | None = None,
    b1: Tensor | None = None,
    w2: Tensor | None = None,
    b2: Tensor | None = None,
    *,
    eps: float = 1e-5,
    act: Activation | str = "relu",
    gate: Activation | str = "sigmoid",
    residual: Tensor | None = None,
    post_act: str | None = None,
    factor: Tensor | None = None,
    group: object | None = None,
) -> tuple[Tensor, Tensor]:
    """(T1) to (T3), differentiable to any order by autograd (but once across processes).

    Args:
        x: [N, C, *spatial], floating point, any strides and device.
        weight, bias: [C] or None (ones, zeros). mean, var: [C], the statistics to use; None takes those of x.
        w1, w2: [R, C] and [C, R] (trailing dimensions of size 1 allowed), None for no gate. b1, b2: [R], [C] or None.
        residual: of x's shape, or None. post_act: "relu" or None. factor: [N] or None. group: a process group or None.

    Returns:
        y: x's shape, dtype ``torch.result_type(x, residual)``; statistics [3, C] in the accumulation dtype, without a
        gradient: mean, (var + eps)^-1/2, and the variance as running statistics keep it (m - 1 for m in (T1)).
    """
    act, gate = Activation.of(act), Activation.of(gate)
    with reference._without_autocast(x):
        s = _stages(x, weight, bias, mean, var, w1, b1, w2, b2, eps, act, gate, factor, group)
        y = _apply(s, x, residual)
        if post_act == "relu":
            y = torch.relu(y)
        unbiased = var.to(s.rstd.dtype) if var is not None else s.var * (s.count / (s.count - 1))
        statistics = torch.stack((s.mean.detach(), s.rstd.detach(), unbiased.detach()))
    return y.to(_dtype_of(x, residual)), statistics


def block_tail_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    mean: Tensor | None = None,
    var: Tensor | None = None,
    w1: Tensor | None = None,
    b1: Tensor | None = None,
    w2: Tensor | None = None,
    b2: Tensor | None = None,
    *,
    eps: float = 1e-5,
    act: Activation | str = "relu",
    gate: Activation | str = "sigmoid",
    residual: Tensor | None = None,
    post_act: str | None = None,
    factor: Tensor | None = None,
    mask: Tensor | None = None,
) -> TailGradients:
    """(T4) to (T7) from the inputs alone, in one process; itself differentiable to any order.

    Args:
        dy: gradient of y, y's shape and dtype. mask: where post_act let the forward through (bool, x's shape); None
            works it out from ``residual``. Others as :func:`block_tail`.
    """
    act, gate = Activation.of(act), Activation.of(gate)
    with reference._without_autocast(x):
        s = _stages(x, weight, bias, mean, var, w1, b1, w2, b2, eps, act, gate, factor, None)
        spatial = tuple(range(2, x.dim()))
        positions = math.prod(x.shape[2:])
        g = dy.to(s.rstd.dtype)
        if post_act == "relu":
            if mask is None:
                mask = ~(_apply(s, x, residual) <= 0)
            g = g * mask
        xhat = s.centred * s.per_channel(s.rstd)
        f = 1.0 if s.factor is None else s.factor[:, None]
        g0, g1 = f * g.sum(spatial), f * (g * xhat).sum(spatial)  # (T4)
        dpooled = dw1 = db1 = dw2 = db2 = None
        dweight, dbias = g1, g0
        if w1 is not None:
            dgate = s.weight * g1 + s.bias * g0  # (T5)
            dlogit = dgate * gate.derivative_from_output(s.gate)  # (B3)
            dpreact = (dlogit @ s.w2) * act.derivative(s.preact)  # (B4)
            dpooled = dpreact @ s.w1  # (B5)
            dw1, dw2 = dpreact.t() @ s.pooled, dlogit.t() @ act(s.preact)  # (B7)
            db1 = None if b1 is None else dpreact.sum(0).to(b1.dtype)
            db2 = None if b2 is None else dlogit.sum(0).to(b2.dtype)
            dw1, dw2 = dw1.reshape(w1.shape).to(w1.dtype), dw2.reshape(w2.shape).to(w2.dtype)
            dweight = s.gate * g1 + dpooled * xhat.mean(spatial)  # (T6)
            dbias = s.gate * g0 + dpooled
        dweight, dbias = dweight.sum(0), dbias.sum(0)
        dx = s.per_sample(s.scale) * g  # (T7)
        slope = s.weight * s.rstd
        if dpooled is not None:
            dx = dx + s.per_sample(slope * dpooled / positions)
        if mean is None:
            dx = dx - s.per_channel(slope * s.rstd * dweight / s.count) * s.centred
            dx = dx - s.per_channel(slope * dbias / s.count)
        return TailGradients(
            dx.to(x.dtype),
            None if weight is None else dweight.to(weight.dtype),
            None if bias is None else dbias.to(bias.dtype),
            dw1,
            db1,
            dw2,
            db2,
            None if residual is None else g.to(residual.dtype),
        )


class _Stages(NamedTuple):
    """Everything between the two sweeps, in the accumulation dtype; centred is x - mu."""

    centred: Tensor
    mean: Tensor
    var: Tensor
    rstd: Tensor
    count: float
    weight: Tensor
    bias: Tensor
    factor: Tensor | None
    pooled: Tensor | None
    preact: Tensor | None
    gate: Tensor | None
    w1: Tensor | None
    w2: Tensor | None
    scale: Tensor
    shift: Tensor

    def per_channel(self, t: Tensor) -> Tensor:
        return t.reshape(1, -1, *(1,) * (self.centred.dim() - 2))

    def per_sample(self, t: Tensor) -> Tensor:
        return t.reshape(*t.shape, *(1,) * (self.centred.dim() - 2))


def _stages(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    w1: Tensor | None,
    b1: Tensor | None,
    w2: Tensor | None,
    b2: Tensor | None,
    eps: float,
    act: Activation,
    gate: Activation,
    factor: Tensor | None,
    group: object | None,
) -> _Stages:
    wide = reference.accumulate_dtype(x)
    samples, channels = x.shape[:2]
    spatial, wider = tuple(range(2, x.dim())), (1, channels, *(1,) * (x.dim() - 2))
    xw = x.to(wide)
    count: float | Tensor = samples * math.prod(x.shape[2:])
    if mean is None:
        if group is None:
            mean = xw.mean(spatial).mean(0)  # (T1)
        else:
            total = _all_reduce(torch.full((1,), count, dtype=wide, device=x.device), group)
            mean = _all_reduce(xw.sum((0, *spatial)), group) / total
            count = float(total)
        centred = xw - mean.reshape(wider)
        squares = centred.square().sum((0, *spatial))
        var = (squares if group is None else _all_reduce(squares, group)) / count
    else:
        mean, var = mean.to(wide), var.to(wide)
        centred = xw - mean.reshape(wider)
    rstd = (var + eps).rsqrt()
    weight = torch.ones_like(rstd) if weight is None else weight.to(wide)
    bias = torch.zeros_like(rstd) if bias is None else bias.to(wide)
    pooled = preact = g = None
    if w1 is not None:
        w1, w2 = w1.flatten(1).to(wide), w2.flatten(1).to(wide)
        pooled = weight * rstd * centred.mean(spatial) + bias  # (T2)
        preact = pooled @ w1.t()  # (E2)
        if b1 is not None:
            preact = preact + b1.to(wide)
        logit = act(preact) @ w2.t()
        if b2 is not None:
            logit = logit + b2.to(wide)
        g = gate(logit)  # (E3)
    scale = torch.ones_like(centred.flatten(2)[..., 0]) if g is None else g
    if factor is not None:
        factor = factor.to(wide)
        scale = scale * factor[:, None]
    return _Stages(
        centred, mean, var, rstd, count, weight, bias, factor, pooled, preact, g, w1, w2,
        scale * (weight * rstd), scale * bias,
    )  # fmt: skip


def _apply(s: _Stages, x: Tensor, residual: Tensor | None) -> Tensor:
    """(T3) in front of post_act."""
    y = s.per_sample(s.scale) * s.centred + s.per_sample(s.shift)
    return y if residual is None else y + residual.to(torch.promote_types(y.dtype, residual.dtype))


def _dtype_of(x: Tensor, residual: Tensor | None) -> torch.dtype:
    return x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)


def _all_reduce(t: Tensor, group: object) -> Tensor:
    from torch.distributed.nn.functional import all_reduce

    return all_reduce(t, group=group)
