r"""The family of operators in plain PyTorch: the definition that every kernel of this package is held against.

x is [N, C, *spatial] with M = the number of spatial positions p, m = N * M. Weights w1 [R, C], b1 [R], w2 [C, R],
b2 [C].

An SE layer's forward (Hu et al. 2018, "Squeeze-and-Excitation Networks", section 3)::

    (E1) pooled[n,c] = mean_p x[n,c,p]                                     squeeze
    (E2) preact[n,:] = w1 @ pooled[n,:] + b1,  hidden = act(preact)        excite
    (E3) gate[n,:]   = gate_fn(w2 @ hidden[n,:] + b2)                      excite
    (E4) y[n,c,p]    = post_act(gate[n,c] * x[n,c,p] + residual[n,c,p])    scale

Its backward. x enters (E4) twice: as the scaled factor and, through the gate, as the squeezed mean. Write g for the
gradient in front of post_act. Then the product rule on (E4) gives (B1), (B2) and the first term of (B6); the chain
rule back through (E3), (E2), (E1) gives (B3) to (B5), and d pooled[n,c] / d x[n,c,p] = 1 / M the second term of (B6).
Weights are shared by all samples, so (B7) sums over n::

    (B1) g = dy * [y > 0] for ReLU, dy without post_act;   dresidual = g
    (B2) dgate[n,c]  = sum_p g[n,c,p] * x[n,c,p]           (+ the gradient that reaches the gate output itself)
    (B3) dlogit      = dgate * gate_fn'
    (B4) dhidden     = dlogit @ w2,  dpreact = dhidden * act'(preact)
    (B5) dpooled     = dpreact @ w1
    (B6) dx[n,c,p]   = gate[n,c] * g[n,c,p] + dpooled[n,c] / M
    (B7) dw1 = dpreact^T pooled, db1 = sum_n dpreact, dw2 = dlogit^T hidden, db2 = sum_n dlogit

Variants of the squeeze: "max" takes pooled = amax_p x, whose gradient is shared evenly by the k[n,c] positions that
attain the maximum (as torch.amax does): dx += dpooled / k * [x = max]. "avgmax" is half of each (timm's add_maxpool).

A block tail has BatchNorm in front, with weight [C], bias [C], and optionally a factor f[n] of each sample's branch
(stochastic depth: Huang et al. 2016). Without w1 there is no gate: BatchNorm -> + residual -> ReLU, and gate[n,c] = 1.
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

An activation may stand behind the norm (MobileNetV3: Howard et al. 2019; EfficientNet: Tan & Le 2019). The squeeze of
what it gives does not follow from sums over x, so the forward has a third sweep; the activation is computed again in
each, from x in the accumulation dtype, and never stored::

    (P1) u = weight * rstd * (x - mu) + bias,  a = pre_act(u),  pooled[n,c] = mean_p a;  (E2), (E3) give gate[n,c]
    (P2) y = post_act(f * gate * a + residual)

Every sum of the backward is linear in dpooled, so it has two sweeps all the same: with g as above and
a' = pre_act'(u)::

    (P3) S0[n,c] = sum_p g * a,  S1 = sum_p g * a',  S2 = sum_p a',  S3 = sum_p g * a' * xhat,  S4 = sum_p a' * xhat
    (P4) dgate = f * S0;  (B3) to (B5), (B7) give dpooled and the SE weights' gradients
    (P5) dbias[c] = sum_n (f * gate * S1 + dpooled / M * S2),  dweight[c] = sum_n (f * gate * S3 + dpooled / M * S4)
    (P6) dx = weight * rstd * ((f * gate * g + dpooled / M) * a' - dbias / m - xhat * dweight / m)

(P5) are the sums of du = (f * gate * g + dpooled / M) * a' and of du * xhat. With the identity for pre_act these are
(T4) to (T7). With given statistics the last two terms of (P6) are not there.

Synchronised BatchNorm is the same with m, mu, var in (T1) and m, dweight, dbias in (T7), (P6) those of all processes.

x - mu stays together in (T3), (T4) and (T7): mu folded into the constants would cancel. Sums, and everything between
the sweeps over x, are float32 (float64 for float64 x), also under autocast.
"""

from __future__ import annotations

import contextlib
import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import torch_private
from .activations import Activation
from .call import Call, Gradients, Outputs

__all__ = [
    "SQUEEZES", "accumulate_dtype", "backward", "block_tail", "block_tail_backward", "forward", "pool",
    "squeeze_excite", "squeeze_excite_backward",
]  # fmt: skip

SQUEEZES = ("avg", "max", "avgmax")


def accumulate_dtype(x: Tensor) -> torch.dtype:
    """The dtype of the sums and of everything between the two sweeps: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def pool(x: Tensor, squeeze: str = "avg") -> Tensor:
    """(E1): [N, C] in the accumulation dtype from x [N, C, *spatial], without a copy of x; squeeze as above."""
    spatial, wide = tuple(range(2, x.dim())), accumulate_dtype(x)
    if squeeze == "max":
        return x.amax(spatial).to(wide)
    mean = x.mean(spatial, dtype=wide)
    return mean if squeeze == "avg" else 0.5 * mean + 0.5 * x.amax(spatial).to(wide)


# ---------------------------------------------------------------------------------------------------- layers and tails


def squeeze_excite(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    b1: Tensor | None = None,
    b2: Tensor | None = None,
    *,
    act: Activation | str = "relu",
    gate: Activation | str = "sigmoid",
    squeeze: str = "avg",
    residual: Tensor | None = None,
    post_act: str | None = None,
) -> tuple[Tensor, Tensor]:
    """(E1) to (E4), differentiable to any order by autograd.

    Args:
        x: [N, C, *spatial], at least one spatial dimension, floating point, any strides and device.
        w1, w2: [R, C] and [C, R] (trailing dimensions of size 1 allowed); b1, b2: [R] and [C] or None.
        act, gate: see :class:`senet_fused.Activation`.
        squeeze: "avg", "max" or "avgmax".
        residual: a tensor of x's shape, added after the scaling, or None.
        post_act: "relu" or None.

    Returns:
        y: x's shape, dtype ``torch.result_type(x, residual)``; gate: [N, C] float32 (float64 for float64 x).
    """
    call = _layer(x, w1, w2, b1, b2, act, gate)._replace(squeeze=squeeze, residual=residual, post_act=post_act or "")
    y, _, g, *_ = forward(call)
    assert g is not None  # there are weights
    return y, g


def squeeze_excite_backward(
    dy: Tensor,
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    b1: Tensor | None = None,
    b2: Tensor | None = None,
    *,
    act: Activation | str = "relu",
    gate: Activation | str = "sigmoid",
    squeeze: str = "avg",
    residual: Tensor | None = None,
    post_act: str | None = None,
    dgate: Tensor | None = None,
    mask: Tensor | None = None,
) -> Gradients:
    """(B1) to (B7) from the inputs alone (nothing saved), itself differentiable to any order.

    Args:
        dy: gradient of y, y's shape and dtype. dgate: gradient of the returned gate [N, C], or None.
        mask: where post_act let the forward through ([N, C, *spatial], bool); None computes it from ``residual``.
        Others as :func:`squeeze_excite`.
    """
    call = _layer(x, w1, w2, b1, b2, act, gate)._replace(squeeze=squeeze, residual=residual, post_act=post_act or "")
    return backward(call, dy, dgate, mask)


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
    pre_act: Activation | str | None = None,
    act: Activation | str = "relu",
    gate: Activation | str = "sigmoid",
    residual: Tensor | None = None,
    post_act: str | None = None,
    factor: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(T1) to (T3), with pre_act (P1) and (P2), differentiable to any order by autograd.

    Args:
        x: [N, C, *spatial], floating point, any strides and device.
        weight, bias: [C] or None (ones, zeros). mean, var: [C], the statistics to use; None takes those of x.
        w1, w2: [R, C] and [C, R] (trailing dimensions of size 1 allowed), None for no gate. b1, b2: [R], [C] or None.
        pre_act: the activation behind BatchNorm, or None.
        residual: of x's shape, or None. post_act: "relu" or None. factor: [N] or None.

    Returns:
        y: x's shape, dtype ``torch.result_type(x, residual)``; statistics [3, C] in the accumulation dtype, without a
        gradient: mean, (var + eps)^-1/2, and the variance as running statistics keep it (m - 1 for m in (T1)).
    """
    call = _layer(x, w1, w2, b1, b2, act, gate)._replace(residual=residual, post_act=post_act or "", factor=factor)
    call = _with_norm(call, weight, bias, mean, var, eps, pre_act)
    y, statistics, *_ = forward(call)
    assert statistics is not None  # there is a norm
    return y, statistics


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
    pre_act: Activation | str | None = None,
    act: Activation | str = "relu",
    gate: Activation | str = "sigmoid",
    residual: Tensor | None = None,
    post_act: str | None = None,
    factor: Tensor | None = None,
    mask: Tensor | None = None,
) -> Gradients:
    """(T4) to (T7), with pre_act (P3) to (P6), from the inputs alone, in one process, differentiable to any order.

    Args:
        dy: gradient of y, y's shape and dtype. mask: where post_act let the forward through (bool, x's shape); None
            computes it from ``residual``. Others as :func:`block_tail`.
    """
    call = _layer(x, w1, w2, b1, b2, act, gate)._replace(residual=residual, post_act=post_act or "", factor=factor)
    call = _with_norm(call, weight, bias, mean, var, eps, pre_act)
    return backward(call, dy, None, mask)


def _layer(
    x: Tensor,
    w1: Tensor | None,
    w2: Tensor | None,
    b1: Tensor | None,
    b2: Tensor | None,
    act: Activation | str,
    gate: Activation | str,
) -> Call:
    act, gate = Activation.of(act).spec, Activation.of(gate).spec
    return Call(x, None, None, None, None, w1, b1, w2, b2, None, None, 0.0, "", act, gate, "avg", "", "")


def _with_norm(
    call: Call,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    pre_act: Activation | str | None,
) -> Call:
    norm, pre_act = "batch" if mean is None else "given", "" if pre_act is None else Activation.of(pre_act).spec
    return call._replace(weight=weight, bias=bias, mean=mean, var=var, eps=eps, norm=norm, pre_act=pre_act)


# ---------------------------------------------------------------------------------------------------- the family


def forward(call: Call) -> Outputs:
    """(E1) to (E4), or with a norm (T1) to (T3) or (P1), (P2), differentiable by autograd: to any order, across
    processes once.

    Tensors of the call may have any strides; group is the name of a process group. y's dtype is
    ``torch.result_type(x, residual)``; saved and mask are None.
    """
    with _without_autocast(call.x):
        s = _stages(call)
        y = _scale(s, call)
        statistics = None
        if s.norm is not None:
            norm = s.norm
            unbiased = norm.var if call.norm == "given" else norm.var * (norm.values / (norm.values - 1))
            statistics = torch.stack((norm.mean.detach(), norm.rstd.detach(), unbiased.detach()))
        if call.post_act == "relu":
            y = torch.relu(y)
    residual = call.residual
    out = call.x.dtype if residual is None else torch.promote_types(call.x.dtype, residual.dtype)
    return Outputs(y.to(out), statistics, None if s.se is None else s.se.gate, None, None)


def backward(call: Call, dy: Tensor, dgate: Tensor | None = None, mask: Tensor | None = None) -> Gradients:
    """(B1) to (B7), or with a norm (T4) to (T7) or (P3) to (P6), from a forward's inputs alone, in one process; itself
    differentiable to any order.

    Args:
        dy: gradient of y. dgate: gradient of the gate [N, C], or None. mask: where post_act let the forward through
            (bool, x's shape); None computes it.
    """
    act, gate = Activation.parse(call.act), Activation.parse(call.gate_fn)
    x, b1, b2, residual, wide = call.x, call.b1, call.b2, call.residual, accumulate_dtype(call.x)
    with _without_autocast(x):
        s = _stages(call)
        norm, se = s.norm, s.se
        spatial, positions = tuple(range(2, x.dim())), math.prod(x.shape[2:])
        g = dy.to(wide)
        if call.post_act == "relu":
            if mask is None:
                mask = ~(_scale(s, call) <= 0)
            g = g * mask  # (B1)
        dweight = dbias = dw1 = db1 = dw2 = db2 = None
        if norm is None:
            into_gate = (g * s.x).sum(spatial)  # (B2)
        else:
            xhat = s.x * _per_channel(norm.rstd, x)
            f = 1.0 if s.factor is None else s.factor[:, None]
            if s.activated is not None:
                into_gate = f * (g * s.activated).sum(spatial)  # (P4)
            else:
                g0, g1 = f * g.sum(spatial), f * (g * xhat).sum(spatial)  # (T4)
                into_gate = norm.weight * g1 + norm.bias * g0  # (T5)
        dx = _per_sample(s.scale, x) * g  # (B6), (T7)
        if se is not None:
            if dgate is not None:
                into_gate = into_gate + dgate.to(wide)
            dlogit = into_gate * gate.derivative_from_output(se.gate)  # (B3)
            dpreact = (dlogit @ se.w2.flatten(1).to(wide)) * act.derivative(se.preact)  # (B4)
            dpooled = dpreact @ se.w1.flatten(1).to(wide)  # (B5)
            dw1, dw2 = dpreact.t() @ se.pooled, dlogit.t() @ act(se.preact)  # (B7)
            dw1, dw2 = dw1.reshape(se.w1.shape).to(se.w1.dtype), dw2.reshape(se.w2.shape).to(se.w2.dtype)
            db1 = None if b1 is None else dpreact.sum(0).to(b1.dtype)
            db2 = None if b2 is None else dlogit.sum(0).to(b2.dtype)
            if norm is None:
                dx = dx + _into_squeeze(call.squeeze, dpooled, s, positions)
            elif s.activated is not None:
                dx = dx + _per_sample(dpooled / positions, x)
            else:
                g0, g1 = se.gate * g0 + dpooled, se.gate * g1 + dpooled * xhat.mean(spatial)  # (T6)
                dx = dx + _per_sample(norm.weight * norm.rstd * dpooled / positions, x)
        if norm is not None:
            slope = norm.weight * norm.rstd
            if s.u is not None:
                dx = dx * Activation.parse(call.pre_act).derivative(s.u)
                g0, g1 = dx.sum((0, *spatial)), (dx * xhat).sum((0, *spatial))  # (P5)
                if call.norm == "batch":
                    dx = dx - _per_channel(g0 / norm.values, x) - xhat * _per_channel(g1 / norm.values, x)
                dx = dx * _per_channel(slope, x)  # (P6)
            else:
                g0, g1 = g0.sum(0), g1.sum(0)
                if call.norm == "batch":
                    dx = dx - _per_channel(slope * norm.rstd * g1 / norm.values, x) * s.x
                    dx = dx - _per_channel(slope * g0 / norm.values, x)
            dweight = None if call.weight is None else g1.to(call.weight.dtype)
            dbias = None if call.bias is None else g0.to(call.bias.dtype)
        dresidual = None if residual is None else g.to(residual.dtype)
        return Gradients(dx.to(x.dtype), dweight, dbias, dw1, db1, dw2, db2, dresidual)


class _Norm(NamedTuple):
    """(T1), in the accumulation dtype; values is m."""

    mean: Tensor
    var: Tensor
    rstd: Tensor
    values: float
    weight: Tensor
    bias: Tensor


class _Excitation(NamedTuple):
    """(E1) to (E3), in the accumulation dtype, and the weights as they are given."""

    pooled: Tensor
    preact: Tensor
    gate: Tensor
    w1: Tensor
    w2: Tensor


class _Stages(NamedTuple):
    """Everything between the sweeps, in the accumulation dtype. x: with a norm's mean taken off. u, activated: (P1)."""

    x: Tensor
    u: Tensor | None
    activated: Tensor | None
    norm: _Norm | None
    factor: Tensor | None
    se: _Excitation | None
    scale: Tensor
    shift: Tensor | None


def _stages(call: Call) -> _Stages:
    wide = accumulate_dtype(call.x)
    x, factor = call.x.to(wide), None if call.factor is None else call.factor.to(wide)
    norm = se = shift = u = activated = None
    if call.norm:
        x, norm = _normalise(call, x)
    if call.pre_act and norm is not None:
        u = x * _per_channel(norm.weight * norm.rstd, x) + _per_channel(norm.bias, x)
        activated = Activation.parse(call.pre_act)(u)  # (P1)
    if call.w1 is not None and call.w2 is not None:
        if norm is None:
            pooled = pool(x, call.squeeze)  # (E1)
        elif activated is not None:
            pooled = pool(activated)  # (P1)
        else:
            pooled = norm.weight * norm.rstd * x.mean(tuple(range(2, x.dim()))) + norm.bias  # (T2)
        preact = pooled @ call.w1.flatten(1).to(wide).t()  # (E2)
        if call.b1 is not None:
            preact = preact + call.b1.to(wide)
        logit = Activation.parse(call.act)(preact) @ call.w2.flatten(1).to(wide).t()
        if call.b2 is not None:
            logit = logit + call.b2.to(wide)
        se = _Excitation(pooled, preact, Activation.parse(call.gate_fn)(logit), call.w1, call.w2)  # (E3)
    scale = torch.ones_like(x.flatten(2)[..., 0]) if se is None else se.gate
    if factor is not None:
        scale = scale * factor[:, None]
    if norm is not None and activated is None:
        scale, shift = scale * (norm.weight * norm.rstd), scale * norm.bias
    return _Stages(x, u, activated, norm, factor, se, scale, shift)


def _normalise(call: Call, x: Tensor) -> tuple[Tensor, _Norm]:
    """x - mu, and (T1)."""
    spatial = tuple(range(2, x.dim()))
    group = torch_private.process_group(call.group) if call.group and call.norm == "batch" else None
    values: float = x.shape[0] * math.prod(x.shape[2:])
    if call.norm == "given":
        assert call.mean is not None and call.var is not None
        mean, var = call.mean.to(x.dtype), call.var.to(x.dtype)
        x = x - _per_channel(mean, x)
    else:
        if group is None:
            mean = x.mean(spatial).mean(0)
        else:
            total = _all_reduce(torch.full((1,), values, dtype=x.dtype, device=x.device), group)
            mean = _all_reduce(x.sum((0, *spatial)), group) / total
            values = float(total)
        x = x - _per_channel(mean, x)
        squares = x.square().sum((0, *spatial))
        var = (squares if group is None else _all_reduce(squares, group)) / values
    rstd = (var + call.eps).rsqrt()
    weight = torch.ones_like(rstd) if call.weight is None else call.weight.to(x.dtype)
    bias = torch.zeros_like(rstd) if call.bias is None else call.bias.to(x.dtype)
    return x, _Norm(mean, var, rstd, values, weight, bias)


def _scale(s: _Stages, call: Call) -> Tensor:
    """(E4), (T3), (P2) in front of post_act."""
    y = (s.x if s.activated is None else s.activated) * _per_sample(s.scale, s.x)
    if s.shift is not None:
        y = y + _per_sample(s.shift, s.x)
    residual = call.residual
    return y if residual is None else y + residual.to(torch.promote_types(y.dtype, residual.dtype))


def _into_squeeze(squeeze: str, dpooled: Tensor, s: _Stages, positions: int) -> Tensor:
    """The second term of (B6): what reaches x through the squeeze."""
    if squeeze == "avg":
        return _per_sample(dpooled * (1.0 / positions), s.x)
    share = 1.0 if squeeze == "max" else 0.5
    spatial = tuple(range(2, s.x.dim()))
    ties = s.x == s.x.amax(spatial, keepdim=True)
    found = _per_sample(dpooled * share / ties.sum(spatial).to(s.x.dtype), s.x) * ties
    return found if squeeze == "max" else found + _per_sample(dpooled * (share / positions), s.x)


def _per_channel(t: Tensor, x: Tensor) -> Tensor:
    return t.reshape(1, -1, *(1,) * (x.dim() - 2))


def _per_sample(t: Tensor, x: Tensor) -> Tensor:
    return t.reshape(*t.shape, *(1,) * (x.dim() - 2))


def _all_reduce(t: Tensor, group: object) -> Tensor:
    from torch.distributed.nn.functional import all_reduce

    return all_reduce(t, group=group)


def _without_autocast(x: Tensor) -> contextlib.AbstractContextManager[object]:
    kind = x.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return contextlib.nullcontext()
