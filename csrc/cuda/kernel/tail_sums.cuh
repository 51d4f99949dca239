// The first sweep of a block tail's backward, (T4) and (T5), and each tile's share of (B4).
#pragma once
#include "excite.cuh"
#include "read_pairs.cuh"
#include "tail.cuh"

namespace senet::cuda {

struct TailSumsArguments : SourceOfPairs {
  Norm norm;
  const float* gate;  // [n, c], or null: none
  float *g0, *g1;     // [n, splits, c]: parts of (T4)
  float* dlogit;      // with a gate
  Bottleneck excite;  // without shares: "launches", or no gate
  float* dpreact;     // "last_block": [n, r]
  int* counters;      // one for each group of samples
};

// From the sums of g and of g * (x - mu), [samples][stride] in shared memory, to this tile's parts and its share.
__device__ __forceinline__ void finish_tail_sums(const TailSumsArguments& a, const TileAt& at, const float* plain,
                                                 float* centred, int stride, float* scratch) {
  for (int i = thread_index(); i < at.samples * at.channels; i += kThreads) {
    const int s = i / at.channels, c = at.c0 + i % at.channels, own = s * stride + i % at.channels;
    const int64_t n = at.n0 + s, part = (n * a.g.splits + at.split) * a.g.c + c;
    const float factor = a.norm.factor_at(n), g0 = factor * plain[own];
    const float g1 = factor * (a.norm.rstd_at(c) * centred[own]);
    a.g0[part] = g0;
    a.g1[part] = g1;
    if (a.gate == nullptr) continue;
    const float dgate = a.norm.weight_at(c) * g1 + a.norm.bias_at(c) * g0;
    centred[own] = a.dlogit[part] = through_gate(a.excite.gate, dgate, a.gate[n * a.g.c + c]);
  }
  __syncthreads();
  if (a.excite.shares == nullptr) return;
  share_dhidden<InSweep>(a.excite, patch_of(a.g, at), centred, stride, scratch, a.dpreact, a.counters, at.group,
                         at.tiles);
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) tail_sums_channels_last_kernel(const TailSumsArguments a) {
  SENET_SHARED(float, scratch, kScratch);
  SENET_SHARED(float, plain, kMaxColumns);
  SENET_SHARED(float, centred, kMaxColumns);
  release_dependents();
  const TileAt at(a.g, blockIdx.x);
  const Column mine(a.g, at);
  float sum[kPack] = {}, sum_centred[kPack] = {};
  if (mine.active) {
    float mean[kPack];
#pragma unroll
    for (int j = 0; j < kPack; ++j) mean[j] = j < mine.count ? a.norm.mean_at(mine.c + j) : 0.0f;
    over_column_pairs<T>(a, at, mine, [&](const Pair8<T>& v) {
      float x[kPack], g[kPack];
      unpack(v.x, x);
      unpack(v.dy, g);
#pragma unroll
      for (int j = 0; j < kPack; ++j) {
        if ((v.keep >> j & 1u) == 0) g[j] = 0.0f;
        sum[j] += g[j];
        sum_centred[j] += g[j] * (x[j] - mean[j]);
      }
    });
  }
  const int stride = a.g.channels;
  over_rows(a.g, mine, sum, scratch, Plus(), [&](int s, int k, float v) { plain[s * stride + k] = v; });
  over_rows(a.g, mine, sum_centred, scratch, Plus(), [&](int s, int k, float v) { centred[s * stride + k] = v; });
  finish_tail_sums(a, at, plain, centred, stride, scratch);
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) tail_sums_planes_kernel(const TailSumsArguments a) {
  SENET_SHARED(float, scratch, kScratch);
  SENET_SHARED(float, plain, kFlatChannels);
  SENET_SHARED(float, centred, kFlatChannels);
  release_dependents();
  const TileAt at(a.g, blockIdx.x);
  const int lane = thread_index() % a.g.lanes, groups = kThreads / a.g.lanes;
  for (int k0 = 0; k0 < at.channels; k0 += groups) {
    const int k = k0 + thread_index() / a.g.lanes;
    float sum[kPack] = {}, sum_centred[kPack] = {};
    if (k < at.channels) {
      const float mean = a.norm.mean_at(at.c0 + k);
      over_plane_pairs<T>(a, at, k, lane, [&](int lo, int hi, const Pair8<T>& v) {
        float x[kPack], g[kPack];
        unpack(v.x, x);
        unpack(v.dy, g);
#pragma unroll
        for (int j = 0; j < kPack; ++j) {
          if ((v.keep >> j & 1u) == 0) g[j] = 0.0f;
          sum[j] += g[j];
          // What is not the plane's is zero, and a mean that is not finite would make NaN of it.
          if (j >= lo && j < hi) sum_centred[j] += g[j] * (x[j] - mean);
        }
      });
    }
    const float total = group_sum(sum_of(sum), a.g.lanes, scratch);
    const float total_centred = group_sum(sum_of(sum_centred), a.g.lanes, scratch);
    if (lane == 0 && k < at.channels) plain[k] = total, centred[k] = total_centred;
  }
  __syncthreads();
  finish_tail_sums(a, at, plain, centred, flat_stride(a.g), scratch);
}

template <class T>
__global__ void __launch_bounds__(kThreads, 3) tail_sums_tile_of_planes_kernel(const TailSumsArguments a) {
  SENET_SHARED(float, scratch, kScratch);
  SENET_SHARED(float, centred, kFlatChannels);
  SENET_DYNAMIC_SHARED(memory);
  static_assert(kScratch >= kFlatChannels);
  release_dependents();
  const TileAt at(a.g, blockIdx.x);
  const int lane = thread_index() % a.g.lanes, groups = kThreads / a.g.lanes;
  const StagedPairs<T> staged(reinterpret_cast<T*>(memory), a, at);
  float* plain = scratch;  // until the shares need it: at most 32 lanes share a plane, so no sum does
  for (int k0 = 0; k0 < at.channels; k0 += groups) {
    const int k = k0 + thread_index() / a.g.lanes;
    float sum = 0.0f, sum_centred = 0.0f;
    if (k < at.channels) {
      const float mean = a.norm.mean_at(at.c0 + k);
      staged.over_plane(a, at, k, lane, [&](float x, float g) {
        sum += g;
        sum_centred += g * (x - mean);
      });
    }
    sum = group_sum(sum, a.g.lanes, nullptr);
    sum_centred = group_sum(sum_centred, a.g.lanes, nullptr);
    if (lane == 0 && k < at.channels) plain[k] = sum, centred[k] = sum_centred;
  }
  __syncthreads();
  finish_tail_sums(a, at, plain, centred, flat_stride(a.g), scratch);
}

}  // namespace senet::cuda
