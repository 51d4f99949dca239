r"""Squeeze-and-Excitation in plain PyTorch: the definition that every kernel of this package is held against.

x is [N, C, *spatial] with M = the number of spatial positions p. Weights w1 [R, C], b1 [R], w2 [C, R], b2 [C].

Forward (Hu et al. 2018, "Squeeze-and-Excitation Networks", section 3)::

    (E1) pooled[n,c] = mean_p x[n,c,p]                                     squeeze
    (E2) preact[n,:] = w1 @ pooled[n,:] + b1,  hidden = act(preact)        excite
    (E3) gate[n,:]   = gate_fn(w2 @ hidden[n,:] + b2)                      excite
    (E4) y[n,c,p]    = post_act(gate[n,c] * x[n,c,p] + residual[n,c,p])    scale

Backward. x enters (E4) twice: as the scaled factor and, through the gate, as the squeezed mean. Write g for the
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

Sums, and everything between the two sweeps over x, are float32 (float64 for float64 inputs), also under autocast.
"""

from __future__ import annotations

import contextlib
import math
from typing import NamedTuple

import torch
from torch import Tensor

from .activations import Activation

__all__ = ["SQUEEZES", "Gradients", "accumulate_dtype", "pool", "squeeze_excite", "squeeze_excite_backward"]

SQUEEZES = ("avg", "max", "avgmax")


class Gradients(NamedTuple):
    """Gradients of :func:`squeeze_excite`, each in its input's shape and dtype; None where there was no input."""

    dx: Tensor
    dw1: Tensor
    db1: Tensor | None
    dw2: Tensor
    db2: Tensor | None
    dresidual: Tensor | None


def accumulate_dtype(x: Tensor) -> torch.dtype:
    """The dtype of the sums and of everything between the two sweeps: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def pool(x: Tensor, squeeze: str = "avg") -> Tensor:
    """(E1): [N, C] in the accumulation dtype from x [N, C, *spatial], without a copy of x; squeeze as above."""
    spatial, wide = tuple(range(2, x.dim())), accumulate_dtype(x)
    mean = None if squeeze == "max" else x.mean(spatial, dtype=wide)
    if squeeze == "avg":
        return mean
    peak = x.amax(spatial).to(wide)
    return peak if mean is None else 0.5 * mean + 0.5 * peak


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
        residual: a tensor of x's shape, added behind the scaling, or None.
        post_act: "relu" or None.

    Returns:
        y: x's shape, dtype ``torch.result_type(x, residual)``; gate: [N, C] float32 (float64 for float64 x).
    """
    with _without_autocast(x):
        stages = _excite(x, w1, w2, b1, b2, Activation.of(act), Activation.of(gate), squeeze)
        y = _scale(x, stages.gate, residual, post_act)
    return y, stages.gate


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
        mask: where post_act let the forward through ([N, C, *spatial], bool); None works it out from ``residual``.
        Others as :func:`squeeze_excite`.
    """
    act, gate = Activation.of(act), Activation.of(gate)
    with _without_autocast(x):
        s = _excite(x, w1, w2, b1, b2, act, gate, squeeze)
        wide = s.gate.dtype
        spatial = tuple(range(2, x.dim()))
        per_channel = (*s.gate.shape, *(1,) * len(spatial))
        g = dy.to(wide)
        if post_act == "relu":
            if mask is None:
                mask = ~(_scale(x, s.gate, residual, None) <= 0)
            g = g * mask
        xw = x.to(wide)
        dgate_total = (g * xw).sum(spatial)  # (B2)
        if dgate is not None:
            dgate_total = dgate_total + dgate.to(wide)
        dlogit = dgate_total * gate.derivative_from_output(s.gate)  # (B3)
        dpreact = (dlogit @ s.w2) * act.derivative(s.preact)  # (B4)
        dpooled = dpreact @ s.w1  # (B5)
        dx = s.gate.reshape(per_channel) * g  # (B6)
        share = {"avg": 1.0, "max": 1.0, "avgmax": 0.5}[squeeze]
        if squeeze != "max":
            dx = dx + (dpooled * (share / math.prod(x.shape[2:]))).reshape(per_channel)
        if squeeze != "avg":
            ties = xw == s.peak.reshape(per_channel)
            count = ties.sum(spatial).to(wide)
            dx = dx + (dpooled * share / count).reshape(per_channel) * ties
        dw1 = dpreact.t() @ s.pooled  # (B7)
        dw2 = dlogit.t() @ act(s.preact)
        return Gradients(
            dx.to(x.dtype),
            dw1.reshape(w1.shape).to(w1.dtype),
            None if b1 is None else dpreact.sum(0).to(b1.dtype),
            dw2.reshape(w2.shape).to(w2.dtype),
            None if b2 is None else dlogit.sum(0).to(b2.dtype),
            None if residual is None else g.to(residual.dtype),
        )


class _Excitation(NamedTuple):
    pooled: Tensor
    peak: Tensor | None
    preact: Tensor
    gate: Tensor
    w1: Tensor
    w2: Tensor


def _excite(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    b1: Tensor | None,
    b2: Tensor | None,
    act: Activation,
    gate: Activation,
    squeeze: str,
) -> _Excitation:
    wide = accumulate_dtype(x)
    xw = x.to(wide)
    spatial = tuple(range(2, x.dim()))
    w1, w2 = w1.flatten(1).to(wide), w2.flatten(1).to(wide)
    pooled = pool(xw, squeeze)
    peak = xw.amax(spatial) if squeeze != "avg" else None
    preact = pooled @ w1.t()  # (E2)
    if b1 is not None:
        preact = preact + b1.to(wide)
    logit = act(preact) @ w2.t()
    if b2 is not None:
        logit = logit + b2.to(wide)
    return _Excitation(pooled, peak, preact, gate(logit), w1, w2)  # (E3)


def _scale(x: Tensor, gate: Tensor, residual: Tensor | None, post_act: str | None) -> Tensor:
    out = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    y = x.to(gate.dtype) * gate.reshape(*gate.shape, *(1,) * (x.dim() - 2))  # (E4)
    if residual is not None:
        y = y + residual.to(torch.promote_types(gate.dtype, residual.dtype))
    if post_act == "relu":
        y = torch.relu(y)
    return y.to(out)


def _without_autocast(x: Tensor) -> contextlib.AbstractContextManager[object]:
    kind = x.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return contextlib.nullcontext()
