// The two small matrix products of (E2), (E3), (B4), (B5), and the weight gradients (B7).
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

}  // namespace SENET_ISA
}  // namespace senet
