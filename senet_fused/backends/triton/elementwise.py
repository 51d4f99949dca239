"""act, gate_fn and their derivatives, as senet_fused.activations defines them, on float32 blocks."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["apply", "derivative", "gate_derivative"]


@triton.jit
def _sigmoid(v):
    return tl.div_rn(1.0, 1.0 + tl.exp(-v))


@triton.jit
def _tanh(v):
    # For small v the quotient would cancel; there the series ends in 62/2835 v^9.
    v2 = v * v
    series = v * (1.0 + v2 * (-1.0 / 3 + v2 * (2.0 / 15 + v2 * (-17.0 / 315 + v2 * (62.0 / 2835)))))
    e = tl.exp(-2.0 * tl.abs(v))
    quotient = tl.div_rn(1.0 - e, 1.0 + e)
    return tl.where(tl.abs(v) < 0.2, series, tl.where(v < 0, -quotient, quotient))


@triton.jit
def _tanh_of_softplus(v):
    # tanh(log(1 + e)) = (e^2 + 2e) / (e^2 + 2e + 2); beyond 20 it is 1 in float32.
    e = tl.exp(tl.minimum(v, 20.0))
    t = e * (e + 2.0)
    return tl.div_rn(t, t + 2.0)


@triton.jit
def _gelu_tanh_argument(v):
    return 0.7978845608028654 * (v + 0.044715 * v * v * v)


@triton.jit
def apply(v, FUNCTION: tl.constexpr, A: tl.constexpr, B: tl.constexpr):
    """An elementwise function by its name in senet_fused.activations, with its parameters."""
    # Comparisons are such that NaN comes through.
    if FUNCTION == "relu":
        v = tl.where(v <= 0, 0.0, v)
    elif FUNCTION == "relu6":
        v = tl.where(v <= 0, 0.0, tl.where(v >= 6, 6.0, v))
    elif FUNCTION == "leaky_relu":
        v = tl.where(v > 0, v, A * v)
    elif FUNCTION == "silu":
        v = v * _sigmoid(v)
    elif FUNCTION == "gelu":
        v = 0.5 * v * (1.0 + tl.erf(v * 0.7071067811865476))
    elif FUNCTION == "gelu_tanh":
        v = v * _sigmoid(2.0 * _gelu_tanh_argument(v))  # 0.5 * (1 + tanh(u)) = sigmoid(2 u)
    elif FUNCTION == "hardswish":
        v = tl.where(v <= -3, 0.0, tl.where(v >= 3, v, v * (v + 3.0) * (1.0 / 6)))
    elif FUNCTION == "mish":
        v = v * _tanh_of_softplus(v)
    elif FUNCTION == "tanh":
        v = _tanh(v)
    elif FUNCTION == "sigmoid":
        v = _sigmoid(v)
    elif FUNCTION == "hardsigmoid":
        v = A * v + B
        v = tl.where(v <= 0, 0.0, tl.where(v >= 1, 1.0, v))
    else:
        tl.static_assert(FUNCTION == "identity")
    return v


@triton.jit
def derivative(v, FUNCTION: tl.constexpr, A: tl.constexpr):
    """d act / d v at v."""
    one = v * 0.0 + 1.0
    if FUNCTION == "relu":
        d = tl.where(v <= 0, 0.0, 1.0)
    elif FUNCTION == "relu6":
        d = tl.where((v <= 0) | (v >= 6), 0.0, 1.0)
    elif FUNCTION == "leaky_relu":
        d = tl.where(v > 0, one, A * one)
    elif FUNCTION == "silu":
        s = _sigmoid(v)
        d = s * (1.0 + v * (1.0 - s))
    elif FUNCTION == "gelu":
        density = tl.exp(-0.5 * v * v) * 0.3989422804014327
        d = 0.5 * (1.0 + tl.erf(v * 0.7071067811865476)) + v * density
    elif FUNCTION == "gelu_tanh":
        s = _sigmoid(2.0 * _gelu_tanh_argument(v))
        slope = 0.7978845608028654 * (1.0 + 0.134145 * v * v)
        d = s + 2.0 * v * s * (1.0 - s) * slope
    elif FUNCTION == "hardswish":
        d = tl.where(v <= -3, 0.0, tl.where(v >= 3, 1.0, v * (1.0 / 3) + 0.5))
    elif FUNCTION == "mish":
        t = _tanh_of_softplus(v)
        d = t + v * (1.0 - t * t) * _sigmoid(v)
    elif FUNCTION == "tanh":
        t = _tanh(v)
        d = 1.0 - t * t
    elif FUNCTION == "sigmoid":
        s = _sigmoid(v)
        d = s * (1.0 - s)
    else:
        tl.static_assert(FUNCTION == "identity")
        d = one
    return d


@triton.jit
def gate_derivative(gate, FUNCTION: tl.constexpr, A: tl.constexpr):
    """d gate_fn / d v from the gate itself."""
    if FUNCTION == "sigmoid":
        d = gate * (1.0 - gate)
    elif FUNCTION == "hardsigmoid":
        d = tl.where((gate > 0) & (gate < 1), A, 0.0)
    elif FUNCTION == "tanh":
        d = 1.0 - gate * gate
    elif FUNCTION == "relu":
        d = tl.where(gate <= 0, 0.0, 1.0)
    else:
        tl.static_assert(FUNCTION == "identity")
        d = gate * 0.0 + 1.0
    return d
