"""act, gate_fn and their derivatives, as senet_fused.activations defines them, on float32 blocks."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["apply", "through_act", "through_gate"]


@triton.jit
def _sigmoid(v):
    return tl.div_rn(1.0, 1.0 + tl.exp(-v))


@triton.jit
def _sigmoid_slope(v):
    # s * (1 - s), which would cancel for large v.
    e = tl.exp(-tl.abs(v))
    return tl.div_rn(e, (1.0 + e) * (1.0 + e))


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
def _chain(upstream, slope, FUNCTION: tl.constexpr):
    """upstream * slope; where a function is flat nothing comes through, be it infinite."""
    product = upstream * slope
    if FUNCTION == "relu":
        product = tl.where(slope == 0, 0.0, product)
    elif FUNCTION == "relu6":
        product = tl.where(slope == 0, 0.0, product)
    elif FUNCTION == "hardswish":
        product = tl.where(slope == 0, 0.0, product)
    elif FUNCTION == "hardsigmoid":
        product = tl.where(slope == 0, 0.0, product)
    return product


@triton.jit
def through_act(upstream, v, FUNCTION: tl.constexpr, A: tl.constexpr):
    """upstream * act'(v)."""
    return _chain(upstream, _derivative(v, FUNCTION, A), FUNCTION)


@triton.jit
def through_gate(upstream, gate, FUNCTION: tl.constexpr, A: tl.constexpr):
    """upstream * gate_fn', from the gate itself."""
    return _chain(upstream, _gate_derivative(gate, FUNCTION, A), FUNCTION)


@triton.jit
def _derivative(v, FUNCTION: tl.constexpr, A: tl.constexpr):
    """d act / d v at v."""
    one = v * 0.0 + 1.0
    if FUNCTION == "relu":
        d = tl.where(v <= 0, 0.0, 1.0)
    elif FUNCTION == "relu6":
        d = tl.where((v <= 0) | (v >= 6), 0.0, 1.0)
    elif FUNCTION == "leaky_relu":
        d = tl.where(v > 0, one, A * one)
    elif FUNCTION == "silu":
        d = _sigmoid(v) + v * _sigmoid_slope(v)
    elif FUNCTION == "gelu":
        density = tl.exp(-0.5 * v * v) * 0.3989422804014327
        d = 0.5 * (1.0 + tl.erf(v * 0.7071067811865476)) + v * density
    elif FUNCTION == "gelu_tanh":
        u = 2.0 * _gelu_tanh_argument(v)
        du = 2.0 * 0.7978845608028654 * (1.0 + 0.134145 * v * v)
        d = _sigmoid(u) + v * _sigmoid_slope(u) * du
    elif FUNCTION == "hardswish":
        d = tl.where(v <= -3, 0.0, tl.where(v >= 3, 1.0, v * (1.0 / 3) + 0.5))
    elif FUNCTION == "mish":
        t = _tanh_of_softplus(v)
        e = tl.exp(tl.minimum(v, 20.0))
        slope = tl.div_rn(2.0, e * (e + 2.0) + 2.0) * (1.0 + t)  # 1 - t^2 without cancellation
        d = tl.where(v > 20, 1.0, t + v * slope * _sigmoid(v))
    elif FUNCTION == "tanh":
        d = 4.0 * _sigmoid_slope(2.0 * v)
    elif FUNCTION == "sigmoid":
        d = _sigmoid_slope(v)
    else:
        tl.static_assert(FUNCTION == "identity")
        d = one
    return d


@triton.jit
def _gate_derivative(gate, FUNCTION: tl.constexpr, A: tl.constexpr):
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
