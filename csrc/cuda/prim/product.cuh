// Small products of a few vectors in shared memory with a matrix of weights. Every thread of the block calls them; the
// order of a sum depends on the matrix alone, never on how many vectors there are (for which its terms are added by
// fmaf, where a compiler could round one way here and another there). v is [samples][stride], stride a
// multiple of 4, 16-byte aligned, with zeros from `inner` up to the next multiple of 4.
#pragma once
#include <cstdint>

#include "reduce.cuh"
#include "weights.cuh"

namespace senet::cuda {

// How many samples a product works on at a time, and how many rows of the matrix: what it has registers for.
struct InSweep {
  static constexpr int kSamples = 2, kRows = 2, kColumnSamples = 2, kUnroll = 1;
};
struct ByItself {
  static constexpr int kSamples = 4, kRows = 4, kColumnSamples = 2, kUnroll = 2;
};
struct OneSample {
  static constexpr int kSamples = 1, kRows = 2, kColumnSamples = 1, kUnroll = 1;
};

namespace detail {

// Threads that share a row: as many as its quads, but no more than leave a group of threads to each row, and at least
// 8, which read 64 or 128 bytes together.
__device__ __forceinline__ int lanes_of_row(int rows, int inner) {
  int lanes = min(32, power_at_least((inner + 3) / 4));
  while (lanes > 8 && kThreads / lanes < rows) lanes /= 2;
  return lanes;
}

template <class Size, class Out>
__device__ __forceinline__ void rows_dot(const Matrix& w, int64_t first, int64_t row_stride, int rows, int inner,
                                         const float* v, int stride, int s0, int samples, Out out) {
  constexpr int kRows = Size::kRows, kSamples = Size::kSamples, kUnroll = Size::kUnroll;
  const int lanes = lanes_of_row(rows, inner), groups = kThreads / lanes;
  const int lane = thread_index() % lanes, group = thread_index() / lanes;
  for (int r0 = 0; r0 < rows; r0 += kRows * groups) {
    float sum[kRows][kSamples] = {};
#pragma unroll kUnroll
    for (int k = 4 * lane; k < inner; k += 4 * lanes) {
      float4 b[kRows];
#pragma unroll
      for (int j = 0; j < kRows; ++j) {
        const int row = r0 + j * groups + group;
        b[j] = weights_at(w, first + row * row_stride + k, row < rows ? inner - k : 0);
      }
#pragma unroll
      for (int s = 0; s < kSamples; ++s) {
        const float4 a = *reinterpret_cast<const float4*>(v + min(s0 + s, samples - 1) * stride + k);
#pragma unroll
        for (int j = 0; j < kRows; ++j)
          sum[j][s] = fmaf(a.w, b[j].w, fmaf(a.z, b[j].z, fmaf(a.y, b[j].y, fmaf(a.x, b[j].x, sum[j][s]))));
      }
    }
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
      const int row = r0 + j * groups + group;
#pragma unroll
      for (int s = 0; s < kSamples; ++s) {
        const float total = group_sum(sum[j][s], lanes, nullptr);
        if (lane == 0 && row < rows && s0 + s < samples) out(s0 + s, row, total);
      }
    }
  }
}

template <class Size, class Out>
__device__ __forceinline__ void columns_dot(const Matrix& w, int64_t first, int64_t row_stride, int columns, int inner,
                                            const float* v, int stride, int s0, int samples, float* scratch, Out out) {
  constexpr int kSamples = Size::kColumnSamples;
  const int quads = (columns + 3) / 4, lanes = min(kThreads, power_at_least(quads)), groups = kThreads / lanes;
  const int lane = thread_index() % lanes, group = thread_index() / lanes;
  for (int q0 = 0; q0 < quads; q0 += lanes) {
    const int c = 4 * (q0 + lane);
    float4 sum[kSamples] = {};
#pragma unroll 4
    for (int j = group; j < inner; j += groups) {
      const float4 b = weights_at(w, first + j * row_stride + c, columns - c);
#pragma unroll
      for (int s = 0; s < kSamples; ++s) {
        const float a = v[min(s0 + s, samples - 1) * stride + j];
        sum[s] =
            make_float4(fmaf(a, b.x, sum[s].x), fmaf(a, b.y, sum[s].y), fmaf(a, b.z, sum[s].z), fmaf(a, b.w, sum[s].w));
      }
    }
    __syncthreads();
#pragma unroll
    for (int s = 0; s < kSamples; ++s) reinterpret_cast<float4*>(scratch)[s * kThreads + thread_index()] = sum[s];
    __syncthreads();
    for (int i = thread_index(); i < kSamples * 4 * lanes; i += kThreads) {
      const int s = i / (4 * lanes), column = i % (4 * lanes);
      float total = 0.0f;
      for (int g = 0; g < groups; ++g) total += scratch[4 * (s * kThreads + g * lanes) + column];
      if (4 * q0 + column < columns && s0 + s < samples) out(s0 + s, 4 * q0 + column, total);
    }
  }
  __syncthreads();
}

}  // namespace detail

// out(sample, row, sum_k w[first + row * row_stride + k] * v[sample][k]) for all rows; each in one thread.
template <class Size, class Out>
__device__ __forceinline__ void rows_dot(const Matrix& w, int64_t first, int64_t row_stride, int rows, int inner,
                                         const float* v, int stride, int samples, Out out) {
  if (samples == 1) return detail::rows_dot<OneSample>(w, first, row_stride, rows, inner, v, stride, 0, 1, out);
  for (int s = 0; s < samples; s += Size::kSamples)
    detail::rows_dot<Size>(w, first, row_stride, rows, inner, v, stride, s, samples, out);
}

// Floats of scratch that columns_dot needs.
template <class Size>
constexpr int kProductScratch = 4 * kThreads * Size::kColumnSamples;

// out(sample, column, sum_j w[first + j * row_stride + column] * v[sample][j]) for all columns; each in one thread.
// Ends behind a barrier.
template <class Size, class Out>
__device__ __forceinline__ void columns_dot(const Matrix& w, int64_t first, int64_t row_stride, int columns, int inner,
                                            const float* v, int stride, int samples, float* scratch, Out out) {
  if (samples == 1)
    return detail::columns_dot<OneSample>(w, first, row_stride, columns, inner, v, stride, 0, 1, scratch, out);
  for (int s = 0; s < samples; s += Size::kColumnSamples)
    detail::columns_dot<Size>(w, first, row_stride, columns, inner, v, stride, s, samples, scratch, out);
}

}  // namespace senet::cuda
