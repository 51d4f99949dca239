// The first sweep of the forward, (E1), and each tile's share of (E2).
#pragma once
#include "excite.cuh"
#include "read_x.cuh"

namespace senet::cuda {

struct SqueezeArguments : SourceOfX {
  float inv_m;
  float* parts;  // of pooled, [n, splits, c] with a stride of its own from sample to sample; or null
  int64_t parts_stride;
  float *peaks, *ties;  // [n, splits, c], with a peak
  Bottleneck excite;    // without shares: "launches"
  int* counters;        // "last_block": one for each group of samples
};

// What one thread knows of the elements it has seen, in eight columns.
template <bool kPeak>
struct Sums {
  float total[kPack] = {}, ties[kPeak ? kPack : 1] = {}, peak[kPeak ? kPack : 1];

  __device__ __forceinline__ Sums() {
#pragma unroll
    for (int j = 0; j < (kPeak ? kPack : 1); ++j) peak[j] = -INFINITY;
  }

  // A NaN lives on in the ties of the column that met it.
  __device__ __forceinline__ void add(int j, float v) {
    total[j] += v;
    if constexpr (kPeak) {
      if (v > peak[j]) {
        peak[j] = v;
        ties[j] = ties[j] * 0.0f + 1.0f;
      } else if (v == peak[j]) {
        ties[j] += 1.0f;
      } else if (v != v) {
        ties[j] = v;
      }
    }
  }
  template <class T>
  __device__ __forceinline__ void add(const Pack<T>& p, int lo, int hi) {
    float v[kPack];
    unpack(p, v);
#pragma unroll
    for (int j = 0; j < kPack; ++j)
      if (!kPeak || (j >= lo && j < hi)) add(j, v[j]);
  }
  // Ties that count once the maximum is known.
  __device__ __forceinline__ float ties_at(int j, float top) const { return peak[j] == top ? ties[j] : ties[j] * 0.0f; }
};

// Stores the tile's parts of pooled [samples][stride] and pushes its share; the last block of the samples adds them up.
__device__ __forceinline__ void finish_squeeze(const SqueezeArguments& a, const TileAt& at, float* pooled, int stride,
                                               float* scratch) {
  if (a.parts != nullptr)
    for (int i = thread_index(); i < at.samples * at.channels; i += kThreads) {
      const int s = i / at.channels, c = i % at.channels;
      a.parts[(at.n0 + s) * a.parts_stride + static_cast<int64_t>(at.split) * a.g.c + at.c0 + c] =
          pooled[s * stride + c];
    }
  if (a.excite.shares == nullptr) return;
  share_preact<InSweep>(a.excite, patch_of(a.g, at), pooled, stride, scratch, a.counters, at.group, at.tiles);
}

// The peak and its ties of one channel of the tile.
__device__ __forceinline__ int64_t peak_at(const SqueezeArguments& a, const TileAt& at, int s, int c) {
  return ((at.n0 + s) * a.g.splits + at.split) * a.g.c + at.c0 + c;
}

template <class T, bool kPeak>
__global__ void __launch_bounds__(kThreads, kPeak ? 2 : 3) squeeze_channels_last_kernel(const SqueezeArguments a) {
  SENET_SHARED(float, scratch, kScratch);
  SENET_SHARED(float, pooled, kMaxColumns);
  release_dependents();
  const TileAt at(a.g, blockIdx.x);
  const Column mine(a.g, at);
  Sums<kPeak> sums;
  if (mine.active) over_column<T>(a, at, mine, [&](const Pack<T>& v) { sums.add(v, 0, kPack); });
  const int stride = a.g.channels;
  over_rows(a.g, mine, sums.total, scratch, Plus(),
            [&](int s, int c, float v) { pooled[s * stride + c] = v * a.inv_m; });
  if constexpr (kPeak) {
    SENET_SHARED(float, top, kMaxColumns);
    over_rows(a.g, mine, sums.peak, scratch, Larger(), [&](int s, int c, float v) {
      top[s * stride + c] = v;
      if (s < at.samples && c < at.channels) a.peaks[peak_at(a, at, s, c)] = v;
    });
    float ties[kPack];
    const int first = mine.sample < a.g.samples ? mine.sample * stride + mine.column : 0;
#pragma unroll
    for (int j = 0; j < kPack; ++j) ties[j] = sums.ties_at(j, top[first + j]);
    over_rows(a.g, mine, ties, scratch, Plus(), [&](int s, int c, float v) {
      if (s < at.samples && c < at.channels) a.ties[peak_at(a, at, s, c)] = v;
    });
  }
  finish_squeeze(a, at, pooled, stride, scratch);
}

// What a group of lanes has seen of plane k of the tile, as one value in its first lane.
template <bool kPeak>
__device__ __forceinline__ void finish_plane(const SqueezeArguments& a, const TileAt& at, const Sums<kPeak>& sums,
                                             int k, bool first_lane, float* pooled, float* scratch) {
  const float total = group_sum(sum_of(sums.total), a.g.lanes, scratch);
  if (first_lane) pooled[k] = total * a.inv_m;
  if constexpr (kPeak) {
    float top = sums.peak[0], ties = 0.0f;
#pragma unroll
    for (int j = 1; j < kPack; ++j) top = fmaxf(top, sums.peak[j]);
    top = group_max(top, a.g.lanes, scratch);
#pragma unroll
    for (int j = 0; j < kPack; ++j) ties += sums.ties_at(j, top);
    ties = group_sum(ties, a.g.lanes, scratch);
    if (first_lane) a.peaks[peak_at(a, at, 0, k)] = top, a.ties[peak_at(a, at, 0, k)] = ties;
  }
}

// Zeros behind the tile's channels, for products that take four at a time.
__device__ __forceinline__ void pad(float* v, int channels) {
  if (thread_index() < (4 - channels % 4) % 4) v[channels + thread_index()] = 0.0f;
}

// Two blocks to a multiprocessor, with half as many loads again under way as three would have: for three a register
// would be missing.
template <class T, bool kPeak>
__global__ void __launch_bounds__(kThreads, 2) squeeze_planes_kernel(const SqueezeArguments a) {
  SENET_SHARED(float, scratch, 4 * kThreads);
  SENET_SHARED(float, pooled, kFlatChannels);
  release_dependents();
  const TileAt at(a.g, blockIdx.x);
  const int lane = thread_index() % a.g.lanes, groups = kThreads / a.g.lanes;
  pad(pooled, at.channels);
  for (int k0 = 0; k0 < at.channels; k0 += groups) {
    const int k = k0 + thread_index() / a.g.lanes;
    Sums<kPeak> sums;
    if (k < at.channels)
      over_plane<T, kInFlight<T> * 3 / 2>(a, at, k, lane,
                                          [&](int lo, int hi, const Pack<T>& v) { sums.add(v, lo, hi); });
    finish_plane(a, at, sums, k, lane == 0 && k < at.channels, pooled, scratch);
  }
  __syncthreads();
  finish_squeeze(a, at, pooled, flat_stride(a.g), scratch);
}

template <class T, bool kPeak>
__global__ void __launch_bounds__(kThreads, kPeak ? 2 : 3) squeeze_tile_of_planes_kernel(const SqueezeArguments a) {
  SENET_SHARED(float, scratch, 4 * kThreads);
  SENET_SHARED(float, pooled, kFlatChannels);
  SENET_DYNAMIC_SHARED(memory);
  T* tile = reinterpret_cast<T*>(memory);
  release_dependents();
  const TileAt at(a.g, blockIdx.x);
  const int m = a.g.m, lane = thread_index() % a.g.lanes, groups = kThreads / a.g.lanes;
  pad(pooled, at.channels);
  stage_planes(tile, a, at);
  for (int k0 = 0; k0 < at.channels; k0 += groups) {
    const int k = k0 + thread_index() / a.g.lanes;
    Sums<kPeak> sums;
    if (k < at.channels) {
#pragma unroll 4
      for (int p = lane; p < m; p += a.g.lanes) sums.add(0, to_float(tile[k * m + p]));
    }
    finish_plane(a, at, sums, k, lane == 0 && k < at.channels, pooled, scratch);
  }
  __syncthreads();
  finish_squeeze(a, at, pooled, flat_stride(a.g), scratch);
}

}  // namespace senet::cuda
