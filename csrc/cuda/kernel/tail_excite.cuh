// Between the sweeps of a block tail's forward: (T1), (T2) and the shares of (E2), for kTailC channels and kMostSamples
// samples to a block.
#pragma once
#include "excite.cuh"
#include "tail.cuh"

namespace senet::cuda {

struct TailExciteArguments {
  int64_t n;
  int splits, positions, m;               // positions of every split but the last
  const float *shifts, *means, *squares;  // [n, splits, c]; with given statistics, means alone
  bool wide;                              // they can be read four at a time
  Norm norm;
  bool merges;                           // the statistics are made here, by each group of samples for itself
  bool pushes;                           // and the shares
  float inv_m, inv_count, inv_less_one;  // 1 / m, 1 / (n m), 1 / (n m - 1) or 0
  float* pooled;                         // what is kept in place of pooled: the mean of xhat
  int64_t saved_stride;
  Bottleneck excite;
  int* counters;  // "last_block": one for each group of samples

  __device__ __forceinline__ float positions_of(int split) const {
    return static_cast<float>(split == splits - 1 ? m - split * positions : positions);
  }
};

constexpr int kMergeParts = kThreads / (kTailC / 4);  // threads that share four channels
constexpr int kMergeStride = kTailC + 1;              // so that a warp's threads read different banks

// Means and squares of the block's channels over every sample and split, as parts to `scratch`. base: the shift that
// the means are taken from, a float for each channel; counts: the positions of each part.
template <bool kWide>
__device__ __forceinline__ void merge_parts(const TailExciteArguments& a, const Patch& at, float* base, float* counts,
                                            float* scratch) {
  constexpr int kAtOnce = kWide ? 4 : 2;
  const int k = thread_index() % (kTailC / 4) * 4, part = thread_index() / (kTailC / 4);
  const bool there = k < at.channels;
  const int64_t c = at.c0 + (there ? k : 0);
  const int some = there ? min(4, at.channels - k) : 1, rows = static_cast<int>(a.n) * a.splits;
  const auto load = [&](const float* from, int row) {
    return floats_at<kWide>(from + c + row * static_cast<int64_t>(a.norm.c), some);
  };
  const float4 first = load(a.shifts, 0);
  const float from[4] = {first.x, first.y, first.z, first.w};
  // About the thread's first mean, so that what lies between the samples does not cancel.
  float about[4] = {}, sum[4] = {}, squares[4] = {}, count = 0.0f;
  for (int row = part; row < rows; row += kAtOnce * kMergeParts) {
    float4 shift[kAtOnce], mean[kAtOnce], square[kAtOnce];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const int r = min(row + u * kMergeParts, rows - 1);
      shift[u] = load(a.shifts, r), mean[u] = load(a.means, r), square[u] = load(a.squares, r);
    }
    // The last row again in place of any behind it, which counts nothing: a branch would keep the loads apart.
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const float shifts[4] = {shift[u].x, shift[u].y, shift[u].z, shift[u].w};
      const float means[4] = {mean[u].x, mean[u].y, mean[u].z, mean[u].w};
      const float m2[4] = {square[u].x, square[u].y, square[u].z, square[u].w};
      const float is_there = row + u * kMergeParts < rows ? 1.0f : 0.0f;
      const float positions = is_there * a.positions_of((row + u * kMergeParts) % a.splits);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float mean_j = (shifts[j] - from[j]) + means[j];
        if (row == part && u == 0) about[j] = finite_or_zero(mean_j);
        const float d = mean_j - about[j];
        sum[j] += positions * d;
        squares[j] += is_there * m2[j] + positions * (d * d);
      }
      count += positions;
    }
  }
  const float inv = count > 0.0f ? 1.0f / count : 0.0f;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    float* to = scratch + part * kMergeStride + k + j;
    to[0] = about[j] + sum[j] * inv;
    to[kMergeParts * kMergeStride] = at_least_zero(squares[j] - sum[j] * (sum[j] * inv));
    if (part == 0) base[k + j] = from[j];
  }
  if (k == 0) counts[part] = count;
}

// (T1) for the block's channels; stored: by the first group of samples.
__device__ __forceinline__ void merge_moments(const TailExciteArguments& a, const Patch& at, bool stored, float* mean,
                                              float* rstd, float* counts, float* scratch) {
  if (a.wide)
    merge_parts<true>(a, at, mean, counts, scratch);
  else
    merge_parts<false>(a, at, mean, counts, scratch);
  __syncthreads();
  constexpr int kLanes = kThreads / kTailC;
  const int k = thread_index() / kLanes, lane = thread_index() % kLanes;
  float sum = 0.0f, squares = 0.0f;
#pragma unroll
  for (int part = lane; part < kMergeParts; part += kLanes) sum += counts[part] * scratch[part * kMergeStride + k];
  const float apart = group_sum(sum, kLanes, nullptr) * a.inv_count;
#pragma unroll
  for (int part = lane; part < kMergeParts; part += kLanes) {
    const float d = scratch[part * kMergeStride + k] - apart;
    squares += scratch[(kMergeParts + part) * kMergeStride + k] + counts[part] * (d * d);
  }
  squares = group_sum(squares, kLanes, nullptr);
  if (lane != 0) return;
  // From here on mean is what float32 has of it.
  mean[k] += apart;
  rstd[k] = a.norm.rstd_of(squares * a.inv_count);
  if (stored && k < at.channels) a.norm.keep(at.c0 + k, mean[k], rstd[k], squares * a.inv_less_one);
}

// The mean of x - mu over a plane.
__device__ __forceinline__ float centred_mean(const TailExciteArguments& a, int64_t n, int c, float mean) {
  const int64_t first = n * a.splits * a.norm.c + c;
  if (a.shifts == nullptr) return sum_splits(a.means + first, a.splits, a.norm.c);
  float sum = 0.0f;
#pragma unroll 4
  for (int split = 0; split < a.splits; ++split) {
    const int64_t at = first + static_cast<int64_t>(split) * a.norm.c;
    sum += a.positions_of(split) * ((a.shifts[at] - mean) + a.means[at]);
  }
  return sum * a.inv_m;
}

__global__ void __launch_bounds__(kThreads, 2) tail_excite_kernel(const TailExciteArguments a) {
  SENET_SHARED(float, scratch, 2 * kMergeParts * kMergeStride);
  SENET_SHARED(float, counts, kMergeParts);
  SENET_SHARED(float, mean, kTailC);
  SENET_SHARED(float, rstd, kTailC);
  SENET_SHARED(float, pooled, kMostSamples* kTailC);
  static_assert(2 * kMergeParts * kMergeStride >= kScratch && kMostSamples * kTailC == kThreads);
  const int blocks = (a.norm.c + kTailC - 1) / kTailC, group = static_cast<int>(blockIdx.x) / blocks;
  const Patch at = patch_at<kTailC>(a.n, a.norm.c, blockIdx.x);
  wait_for_previous();
  release_dependents();
  if (a.merges) {
    merge_moments(a, at, group == 0, mean, rstd, counts, scratch);
  } else if (thread_index() < at.channels) {
    mean[thread_index()] = a.norm.mean_at(at.c0 + thread_index());
    rstd[thread_index()] = a.norm.rstd_at(at.c0 + thread_index());
  }
  __syncthreads();
  if (!a.pushes) return;
  const int s = thread_index() / kTailC, k = thread_index() % kTailC, c = at.c0 + k;
  float v = 0.0f;
  if (s < at.samples && k < at.channels) {
    const float xhat = rstd[k] * centred_mean(a, at.n0 + s, c, mean[k]);
    a.pooled[(at.n0 + s) * a.saved_stride + c] = xhat;
    v = a.norm.weight_at(c) * xhat + a.norm.bias_at(c);  // (T2)
  }
  pooled[thread_index()] = v;
  __syncthreads();
  share_preact<ByItself>(a.excite, at, pooled, kTailC, scratch, a.counters, group, blocks);
}

}  // namespace senet::cuda
