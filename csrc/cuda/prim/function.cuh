// act, gate_fn and their derivatives, as senet_fused/activations.py defines them. Which one is known at run time only:
// they are applied to vectors, never to the tensor, and called as functions, or they would be most of a kernel's code.
// Comparisons are such that NaN comes through.
#pragma once
#include "../../plan/plan.h"
#include "port.cuh"

namespace senet::cuda {

struct Elementwise {
  Function function;
  float p0, p1;
};

__device__ __forceinline__ float sigmoid(float v) { return 1.0f / (1.0f + expf(-v)); }
// s * (1 - s), which would cancel for large v.
__device__ __forceinline__ float sigmoid_slope(float v) {
  const float e = expf(-fabsf(v));
  return e / ((1.0f + e) * (1.0f + e));
}
// tanh(log(1 + e)); beyond 20 it is 1 in float32.
__device__ __forceinline__ float tanh_of_softplus(float v) {
  const float e = expf(fminf(v, 20.0f)), t = e * (e + 2.0f);
  return v != v ? v : t / (t + 2.0f);
}
__device__ __forceinline__ float gelu_tanh_argument(float v) {
  return 0.7978845608028654f * (v + 0.044715f * v * v * v);
}

__device__ __noinline__ inline float apply(const Elementwise f, float v) {
  switch (f.function) {
    case Function::identity:
      return v;
    case Function::relu:
      return v <= 0.0f ? 0.0f : v;
    case Function::relu6:
      return v <= 0.0f ? 0.0f : v >= 6.0f ? 6.0f : v;
    case Function::leaky_relu:
      return v > 0.0f ? v : f.p0 * v;
    case Function::silu:
      return v * sigmoid(v);
    case Function::gelu:
      return 0.5f * v * (1.0f + erff(v * 0.7071067811865476f));
    case Function::gelu_tanh:
      return v * sigmoid(2.0f * gelu_tanh_argument(v));  // 0.5 * (1 + tanh(u)) = sigmoid(2 u)
    case Function::hardswish:
      return v <= -3.0f ? 0.0f : v >= 3.0f ? v : v * (v + 3.0f) * (1.0f / 6);
    case Function::mish:
      return v * tanh_of_softplus(v);
    case Function::tanh:
      return tanhf(v);
    case Function::sigmoid:
      return sigmoid(v);
    case Function::hardsigmoid: {
      const float w = f.p0 * v + f.p1;
      return w <= 0.0f ? 0.0f : w >= 1.0f ? 1.0f : w;
    }
  }
  return v;
}

// Where a function is flat nothing comes through, be it infinite.
__device__ __forceinline__ float chain(float upstream, float slope, Function f) {
  const bool has_flat =
      f == Function::relu || f == Function::relu6 || f == Function::hardswish || f == Function::hardsigmoid;
  return has_flat && slope == 0.0f ? 0.0f : upstream * slope;
}

// upstream * act'(v)
__device__ __noinline__ inline float through_act(const Elementwise f, float upstream, float v) {
  float slope = v != v ? v : 1.0f;
  if (f.function == Function::relu) slope = v <= 0.0f ? 0.0f : 1.0f;
  if (f.function == Function::relu6) slope = v <= 0.0f || v >= 6.0f ? 0.0f : 1.0f;
  if (f.function == Function::leaky_relu) slope = v > 0.0f ? slope : f.p0 * slope;
  if (f.function == Function::silu) slope = sigmoid(v) + v * sigmoid_slope(v);
  if (f.function == Function::gelu)
    slope = 0.5f * (1.0f + erff(v * 0.7071067811865476f)) + v * expf(-0.5f * v * v) * 0.3989422804014327f;
  if (f.function == Function::gelu_tanh) {
    const float u = 2.0f * gelu_tanh_argument(v), du = 2.0f * 0.7978845608028654f * (1.0f + 0.134145f * v * v);
    slope = sigmoid(u) + v * sigmoid_slope(u) * du;
  }
  if (f.function == Function::hardswish) slope = v <= -3.0f ? 0.0f : v >= 3.0f ? 1.0f : v * (1.0f / 3) + 0.5f;
  if (f.function == Function::mish) {
    const float t = tanh_of_softplus(v), e = expf(fminf(v, 20.0f));
    const float rest = 2.0f / (e * (e + 2.0f) + 2.0f) * (1.0f + t);  // 1 - t^2 without cancellation
    slope = v > 20.0f ? 1.0f : t + v * rest * sigmoid(v);
  }
  if (f.function == Function::tanh) slope = 4.0f * sigmoid_slope(2.0f * v);
  if (f.function == Function::sigmoid) slope = sigmoid_slope(v);
  return chain(upstream, slope, f.function);
}

// upstream * gate_fn', from the gate itself
__device__ inline float through_gate(const Elementwise& f, float upstream, float gate) {
  float slope = gate != gate ? gate : 1.0f;
  if (f.function == Function::sigmoid) slope = gate * (1.0f - gate);
  if (f.function == Function::hardsigmoid) slope = gate > 0.0f && gate < 1.0f ? f.p0 : 0.0f;
  if (f.function == Function::tanh) slope = 1.0f - gate * gate;
  if (f.function == Function::relu) slope = gate <= 0.0f ? 0.0f : 1.0f;
  return chain(upstream, slope, f.function);
}

}  // namespace senet::cuda
