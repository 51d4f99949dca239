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
  static constexpr int kSamples = 4, kRows = 2, kColumnSamples = 2, kUnroll = 4;
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

template <class Size, class Load, class Out>
__device__ __forceinline__ void rows_dot(const Load& load, int64_t first, int64_t row_stride, int rows, int inner,
                                         const float* v, int stride, int s0, int samples, Out out) {
  constexpr int kRows = Size::kRows, kSamples = Size::kSamples, kUnroll = Size::kUnroll;
  const int lanes = lanes_of_row(rows, inner), groups = kThreads / lanes;
  const int lane = thread_index() % lanes, group = thread_index() / lanes;
  const int last = (inner - 1) / 4 * 4;
  for (int r0 = 0; r0 < rows; r0 += kRows * groups) {
    float sum[kRows][kSamples] = {};
    for (int k0 = 4 * lane; k0 < inner; k0 += 4 * lanes * kUnroll) {
      // Loaded before the first is used: what lies beyond the matrix is its last row or quad again.
      float4 b[kUnroll][kRows];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u)
#pragma unroll
        for (int j = 0; j < kRows; ++j) {
          const int k = min(k0 + 4 * lanes * u, last), row = min(r0 + j * groups + group, rows - 1);
          b[u][j] = load(first + row * row_stride + k, inner - k);
        }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int k = k0 + 4 * lanes * u;
        if (k >= inner) break;
#pragma unroll
        for (int s = 0; s < kSamples; ++s) {
          const float4 a = *reinterpret_cast<const float4*>(v + min(s0 + s, samples - 1) * stride + k);
#pragma unroll
          for (int j = 0; j < kRows; ++j) {
            const float4& w = b[u][j];
            sum[j][s] = fmaf(a.w, w.w, fmaf(a.z, w.z, fmaf(a.y, w.y, fmaf(a.x, w.x, sum[j][s]))));
          }
        }
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

template <class Size, class Load, class Out>
__device__ __forceinline__ void columns_dot(const Load& load, int64_t first, int64_t row_stride, int columns, int inner,
                                            const float* v, int stride, int s0, int samples, float* scratch, Out out) {
  constexpr int kSamples = Size::kColumnSamples, kAtOnce = 4;
  const int quads = (columns + 3) / 4, lanes = min(kThreads, power_at_least(quads)), groups = kThreads / lanes;
  const int lane = thread_index() % lanes, group = thread_index() / lanes;
  for (int q0 = 0; q0 < quads; q0 += lanes) {
    const int c = 4 * min(q0 + lane, quads - 1);
    float4 sum[kSamples] = {};
    for (int j0 = group; j0 < inner; j0 += kAtOnce * groups) {
      float4 b[kAtOnce];
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u)
        b[u] = load(first + min(j0 + u * groups, inner - 1) * row_stride + c, columns - c);
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        const int j = j0 + u * groups;
        if (j >= inner) break;
#pragma unroll
        for (int s = 0; s < kSamples; ++s) {
          const float a = v[min(s0 + s, samples - 1) * stride + j];
          sum[s] = make_float4(fmaf(a, b[u].x, sum[s].x), fmaf(a, b[u].y, sum[s].y), fmaf(a, b[u].z, sum[s].z),
                               fmaf(a, b[u].w, sum[s].w));
        }
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
  with_weights(w, first % 4 == 0 && inner % 4 == 0, [&](const auto& load) {
    if (samples == 1) {
      detail::rows_dot<OneSample>(load, first, row_stride, rows, inner, v, stride, 0, 1, out);
      return;
    }
    for (int s = 0; s < samples; s += Size::kSamples)
      detail::rows_dot<Size>(load, first, row_stride, rows, inner, v, stride, s, samples, out);
  });
}

// Floats of scratch that columns_dot needs.
template <class Size>
constexpr int kProductScratch = 4 * kThreads * Size::kColumnSamples;

// out(sample, column, sum_j w[first + j * row_stride + column] * v[sample][j]) for all columns; each in one thread.
// Ends behind a barrier.
template <class Size, class Out>
__device__ __forceinline__ void columns_dot(const Matrix& w, int64_t first, int64_t row_stride, int columns, int inner,
                                            const float* v, int stride, int samples, float* scratch, Out out) {
  with_weights(w, first % 4 == 0 && columns % 4 == 0, [&](const auto& load) {
    if (samples == 1) {
      detail::columns_dot<OneSample>(load, first, row_stride, columns, inner, v, stride, 0, 1, scratch, out);
      return;
    }
    for (int s = 0; s < samples; s += Size::kColumnSamples)
      detail::columns_dot<Size>(load, first, row_stride, columns, inner, v, stride, s, samples, scratch, out);
  });
}

}  // namespace senet::cuda
