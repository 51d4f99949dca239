// The two small matrix products of (E2), (E3), (B4), (B5), the weight gradients (B7), and the elementwise functions.
//
// A BLAS picks its kernel, and so its summation order, by the size of the batch. Here each output is one sum in one
// order (vector lanes over k, or j in sequence), whatever else shares the registers: a sample alone gives the same bits
// as a sample in a batch.
#pragma once
#include "../kernels.h"
#include "../vec.h"
#include "squeeze.h"

namespace senet {
namespace SENET_ISA {

// Samples and rows that share their loads; as many accumulators as the registers hold.
#if defined(__AVX512F__)
constexpr int kSamples = 4, kRows = 4;
#else
constexpr int kSamples = 2, kRows = 2;
#endif

template <class W, int kN, int kR>
SENET_INLINE void rows_dot_block(const W* w, const Acc<W>* bias, const Acc<W>* v, int64_t v_stride, Acc<W>* out,
                                 int64_t out_stride, int64_t k) {
  using A = Acc<W>;
  Group<A> sum[kN][kR];
  for (int i = 0; i < kN; ++i)
    for (int r = 0; r < kR; ++r) sum[i][r] = splat<A>(0);
  int64_t at = 0;
  for (; at + kGroup <= k; at += kGroup) {
    Group<A> weight[kR];
    for (int r = 0; r < kR; ++r) weight[r] = load(w + r * k + at);
    for (int i = 0; i < kN; ++i) {
      const Group<A> value = load(v + i * v_stride + at);
      for (int r = 0; r < kR; ++r) sum[i][r] = fma(weight[r], value, sum[i][r]);
    }
  }
  if (at < k) {
    const int count = int(k - at);
    for (int i = 0; i < kN; ++i) {
      const Group<A> value = load_part(v + i * v_stride + at, count);
      for (int r = 0; r < kR; ++r) sum[i][r] = fma(load_part(w + r * k + at, count), value, sum[i][r]);
    }
  }
  for (int i = 0; i < kN; ++i)
    for (int r = 0; r < kR; ++r) out[i * out_stride + r] = sum_of_lanes(sum[i][r]) + (bias != nullptr ? bias[r] : A(0));
}

template <class W, int kR>
SENET_INLINE void rows_dot_samples(const W* w, const Acc<W>* bias, const Acc<W>* v, int64_t v_stride, Acc<W>* out,
                                   int64_t out_stride, int64_t n, int64_t k) {
  int64_t i = 0;
  for (; i + kSamples <= n; i += kSamples)
    rows_dot_block<W, kSamples, kR>(w, bias, v + i * v_stride, v_stride, out + i * out_stride, out_stride, k);
  for (; i < n; ++i) rows_dot_block<W, 1, kR>(w, bias, v + i * v_stride, v_stride, out + i * out_stride, out_stride, k);
}

template <class W>
void rows_dot(const void* weights, const Acc<W>* bias, const Acc<W>* v, int64_t v_stride, Acc<W>* out,
              int64_t out_stride, int64_t n, int64_t row0, int64_t row1, int64_t k) {
  const W* w = static_cast<const W*>(weights);
  const auto bias_at = [bias](int64_t row) { return bias != nullptr ? bias + row : nullptr; };
  int64_t row = row0;
  for (; row + kRows <= row1; row += kRows)
    rows_dot_samples<W, kRows>(w + row * k, bias_at(row), v, v_stride, out + row, out_stride, n, k);
  for (; row < row1; ++row) rows_dot_samples<W, 1>(w + row * k, bias_at(row), v, v_stride, out + row, out_stride, n, k);
}

// Sums over j are taken in parts, each by itself and then added to the total: one running sum of 2048 float32 terms has
// four times the error of stock PyTorch's.
constexpr int64_t kPart = 128;

// out[i, 0..kWide groups) for kN samples; the last group may be `count` < 16 wide.
template <class W, int kN, int kWide>
SENET_INLINE void columns_dot_groups(const W* w, int64_t width, const Acc<W>* v, int64_t v_stride, Acc<W>* out,
                                     int64_t out_stride, int count, int64_t j) {
  using A = Acc<W>;
  Group<A> total[kN][kWide];
  for (int i = 0; i < kN; ++i)
    for (int g = 0; g < kWide; ++g) total[i][g] = splat<A>(0);
  for (int64_t begin = 0; begin < j; begin += kPart) {
    const int64_t end = begin + kPart < j ? begin + kPart : j;
    Group<A> sum[kN][kWide];
    for (int i = 0; i < kN; ++i)
      for (int g = 0; g < kWide; ++g) sum[i][g] = splat<A>(0);
    for (int64_t at = begin; at < end; ++at) {
      Group<A> weight[kWide];
      for (int g = 0; g < kWide; ++g) weight[g] = load_upto(w + at * width + g * kGroup, count);
      for (int i = 0; i < kN; ++i) {
        const Group<A> value = splat<A>(v[i * v_stride + at]);
        for (int g = 0; g < kWide; ++g) sum[i][g] = fma(weight[g], value, sum[i][g]);
      }
    }
    for (int i = 0; i < kN; ++i)
      for (int g = 0; g < kWide; ++g) total[i][g] = total[i][g] + sum[i][g];
  }
  for (int i = 0; i < kN; ++i)
    for (int g = 0; g < kWide; ++g) store_upto(out + i * out_stride + g * kGroup, total[i][g], count);
}

template <class W, int kN>
SENET_INLINE void columns_dot_block(const W* w, int64_t width, const Acc<W>* v, int64_t v_stride, Acc<W>* out,
                                    int64_t out_stride, int64_t columns, int64_t j) {
  constexpr int kWide = 2;
  int64_t col = 0;
  for (; col + kWide * kGroup <= columns; col += kWide * kGroup)
    columns_dot_groups<W, kN, kWide>(w + col, width, v, v_stride, out + col, out_stride, kGroup, j);
  for (; col + kGroup <= columns; col += kGroup)
    columns_dot_groups<W, kN, 1>(w + col, width, v, v_stride, out + col, out_stride, kGroup, j);
  if (col < columns)
    columns_dot_groups<W, kN, 1>(w + col, width, v, v_stride, out + col, out_stride, int(columns - col), j);
}

template <class W>
void columns_dot(const void* weights, int64_t width, const Acc<W>* v, int64_t v_stride, Acc<W>* out, int64_t out_stride,
                 int64_t n, int64_t col0, int64_t col1, int64_t j) {
  const W* w = static_cast<const W*>(weights) + col0;
  int64_t i = 0;
  for (; i + kSamples <= n; i += kSamples)
    columns_dot_block<W, kSamples>(w, width, v + i * v_stride, v_stride, out + i * out_stride + col0, out_stride,
                                   col1 - col0, j);
  for (; i < n; ++i)
    columns_dot_block<W, 1>(w, width, v + i * v_stride, v_stride, out + i * out_stride + col0, out_stride, col1 - col0,
                            j);
}

template <class W, int kR>
SENET_INLINE void outer_sum_block(const Acc<W>* a, int64_t a_stride, const Acc<W>* b, int64_t b_stride, W* dw,
                                  int64_t n, int64_t k) {
  using A = Acc<W>;
  for (int64_t at = 0; at < k; at += kGroup) {
    const int count = k - at < kGroup ? int(k - at) : kGroup;
    Group<A> sum[kR];
    for (int r = 0; r < kR; ++r) sum[r] = splat<A>(0);
    for (int64_t i = 0; i < n; ++i) {
      const A* from = b + i * b_stride + at;
      const Group<A> value = load_upto(from, count);
      for (int r = 0; r < kR; ++r) sum[r] = fma(splat<A>(a[i * a_stride + r]), value, sum[r]);
    }
    for (int r = 0; r < kR; ++r) {
      store_upto(dw + r * k + at, sum[r], count);
    }
  }
}

template <class W>
void outer_sum(const Acc<W>* a, int64_t a_stride, const Acc<W>* b, int64_t b_stride, void* dw, int64_t n, int64_t row0,
               int64_t row1, int64_t k) {
  int64_t row = row0;
  for (; row + 4 <= row1; row += 4)
    outer_sum_block<W, 4>(a + row, a_stride, b, b_stride, static_cast<W*>(dw) + row * k, n, k);
  for (; row < row1; ++row) outer_sum_block<W, 1>(a + row, a_stride, b, b_stride, static_cast<W*>(dw) + row * k, n, k);
}

// ------------------------------------------------------------------------------------------------ functions

SENET_INLINE float c_exp(float v) { return ::expf(v); }
SENET_INLINE double c_exp(double v) { return ::exp(v); }
SENET_INLINE float c_tanh(float v) { return ::tanhf(v); }
SENET_INLINE double c_tanh(double v) { return ::tanh(v); }
SENET_INLINE float c_erf(float v) { return ::erff(v); }
SENET_INLINE double c_erf(double v) { return ::erf(v); }
SENET_INLINE float c_log1p(float v) { return ::log1pf(v); }
SENET_INLINE double c_log1p(double v) { return ::log1p(v); }

template <class A>
SENET_INLINE A logistic(A v) {
  return 1 / (1 + c_exp(-v));
}
template <class A>
SENET_INLINE A softplus(A v) {  // torch: the identity above 20
  return v > 20 ? v : c_log1p(c_exp(v));
}

constexpr double kSqrtHalf = 0.70710678118654752440, kInvSqrt2Pi = 0.39894228040143267794;
constexpr double kGeluA = 0.79788456080286535588, kGeluB = 0.044715;

template <class A>
SENET_INLINE A value_of(Function f, A p0, A p1, A v) {
  switch (f) {
    case Function::identity:
      return v;
    case Function::relu:
      return v <= 0 ? A(0) : v;
    case Function::relu6:
      return v <= 0 ? A(0) : v >= 6 ? A(6) : v;
    case Function::leaky_relu:
      return v > 0 ? v : v * p0;
    case Function::silu:
      return v / (1 + c_exp(-v));
    case Function::gelu:
      return v * A(0.5) * (1 + c_erf(v * A(kSqrtHalf)));
    case Function::gelu_tanh:
      return A(0.5) * v * (1 + c_tanh(A(kGeluA) * (v + A(kGeluB) * v * v * v)));
    case Function::hardswish:
      return v <= -3 ? v * A(0) : v >= 3 ? v : v * (v + 3) / 6;  // -inf gives NaN, as torch
    case Function::mish:
      return v * c_tanh(softplus(v));
    case Function::tanh:
      return c_tanh(v);
    case Function::sigmoid:
      return logistic(v);
    case Function::hardsigmoid: {
      const A linear = p0 * v + p1;
      return linear <= 0 ? A(0) : linear >= 1 ? A(1) : linear;
    }
  }
  return v;
}

template <class A>
SENET_INLINE A derivative_of(Function f, A p0, A p1, A v) {
  switch (f) {
    case Function::identity:
      return A(1);
    case Function::relu:
      return v <= 0 ? A(0) : A(1);
    case Function::relu6:
      return v <= 0 || v >= 6 ? A(0) : A(1);
    case Function::leaky_relu:
      return v > 0 ? A(1) : p0;
    case Function::silu: {
      const A s = logistic(v);
      return s * (1 + v * (1 - s));
    }
    case Function::gelu:
      return A(0.5) * (1 + c_erf(v * A(kSqrtHalf))) + v * c_exp(A(-0.5) * v * v) * A(kInvSqrt2Pi);
    case Function::gelu_tanh: {
      const A t = c_tanh(A(kGeluA) * (v + A(kGeluB) * v * v * v));
      return A(0.5) * (1 + t) + A(0.5) * v * (1 - t * t) * A(kGeluA) * (1 + 3 * A(kGeluB) * v * v);
    }
    case Function::hardswish:
      return v <= -3 ? A(0) : v >= 3 ? A(1) : v / 3 + A(0.5);
    case Function::mish: {
      const A t = c_tanh(softplus(v));
      return t + v * (1 - t * t) * logistic(v);
    }
    case Function::tanh: {
      const A t = c_tanh(v);
      return 1 - t * t;
    }
    case Function::sigmoid: {
      const A s = logistic(v);
      return s * (1 - s);
    }
    case Function::hardsigmoid: {
      const A linear = p0 * v + p1;
      return linear > 0 && linear < 1 ? p0 : A(0);
    }
  }
  return A(1);
}

SENET_INLINE void logistic_values(const float* v, float* out, int64_t count) {
  const Group<float> one = splat<float>(1), zero = splat<float>(0);
  for (int64_t i = 0; i < count; i += kGroup) {
    const int part = count - i < kGroup ? int(count - i) : kGroup;
    const Group<float> logit = load_upto(v + i, part);
    const Group<float> s = one / (one + exp(zero - logit));
    store_upto(out + i, s, part);
  }
}
SENET_INLINE void logistic_values(const double* v, double* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = logistic(v[i]);
}

template <class A>
void apply_function(Function f, double p0, double p1, const A* v, A* out, int64_t count) {
  if (f == Function::sigmoid) return logistic_values(v, out, count);
  for (int64_t i = 0; i < count; ++i) out[i] = value_of<A>(f, A(p0), A(p1), v[i]);
}
template <class A>
void function_backward(Function f, double p0, double p1, const A* v, const A* d, A* out, int64_t count) {
  const bool flat =
      f == Function::relu || f == Function::relu6 || f == Function::hardswish || f == Function::hardsigmoid;
  for (int64_t i = 0; i < count; ++i) {
    const A slope = derivative_of<A>(f, A(p0), A(p1), v[i]);
    out[i] = flat && slope == 0 ? A(0) : d[i] * slope;  // as torch: where the function is flat, not even NaN passes
  }
}
template <class A>
void function_backward_from_output(Function f, double p0, double, const A* value, const A* d, A* out, int64_t count) {
  switch (f) {
    case Function::sigmoid:
      for (int64_t i = 0; i < count; ++i) out[i] = d[i] * (value[i] * (1 - value[i]));
      return;
    case Function::tanh:
      for (int64_t i = 0; i < count; ++i) out[i] = d[i] * (1 - value[i] * value[i]);
      return;
    case Function::hardsigmoid:
      for (int64_t i = 0; i < count; ++i) out[i] = value[i] > 0 && value[i] < 1 ? d[i] * A(p0) : A(0);
      return;
    case Function::relu:
      for (int64_t i = 0; i < count; ++i) out[i] = value[i] <= 0 ? A(0) : d[i];
      return;
    default:  // identity; the host file lets no other gate in
      for (int64_t i = 0; i < count; ++i) out[i] = d[i];
  }
}

}  // namespace SENET_ISA
}  // namespace senet
