// The first sweep of the backward, (B1) to (B3), and each tile's share of (B4).
#pragma once
#include "excite.cuh"
#include "read_pairs.cuh"

namespace senet::cuda {

struct SqueezeBackwardArguments : SourceOfPairs {
  const float* dgate;  // [n, c], or null
  const float* gate;   // [n, c]
  float* parts;        // of dlogit, [n, splits, c]
  Bottleneck excite;   // without shares: "launches"
  float* dpreact;      // "last_block": [n, r]
  int* counters;       // one for each group of samples
};

template <class T>
__device__ __forceinline__ void add_products(const Pair8<T>& v, float (&total)[kPack]) {
  float x[kPack], dy[kPack];
  unpack(v.x, x);
  unpack(v.dy, dy);
#pragma unroll
  for (int j = 0; j < kPack; ++j) total[j] += (v.keep >> j & 1u) != 0 ? x[j] * dy[j] : x[j] * 0.0f;
}

// From dgate [samples][stride] in shared memory, which becomes dlogit, to this tile's parts and its share.
__device__ __forceinline__ void finish_squeeze_backward(const SqueezeBackwardArguments& a, const TileAt& at,
                                                        float* dgate, int stride, float* scratch) {
  for (int i = thread_index(); i < at.samples * at.channels; i += kThreads) {
    const int s = i / at.channels, c = i % at.channels;
    const int64_t n = at.n0 + s, nc = n * a.g.c + at.c0 + c;
    float& v = dgate[s * stride + c];
    if (a.dgate != nullptr && at.split == 0) v += a.dgate[nc];
    v = through_gate(a.excite.gate, v, a.gate[nc]);
    a.parts[(n * a.g.splits + at.split) * a.g.c + at.c0 + c] = v;
  }
  __syncthreads();
  if (a.excite.shares == nullptr) return;
  share_dhidden<InSweep>(a.excite, patch_of(a.g, at), dgate, stride, scratch, a.dpreact, a.counters, at.group,
                         at.tiles);
}

template <class T>
__global__ void __launch_bounds__(kThreads, 3) squeeze_backward_channels_last_kernel(const SqueezeBackwardArguments a) {
  SENET_SHARED(float, scratch, kScratch);
  SENET_SHARED(float, dgate, kMaxColumns);
  release_dependents();
  const TileAt at(a.g, blockIdx.x);
  const Column mine(a.g, at);
  float total[kPack] = {};
  if (mine.active) over_column_pairs<T>(a, at, mine, [&](const Pair8<T>& v) { add_products(v, total); });
  const int stride = a.g.channels;
  over_rows(a.g, mine, total, scratch, Plus(), [&](int s, int k, float v) { dgate[s * stride + k] = v; });
  finish_squeeze_backward(a, at, dgate, stride, scratch);
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) squeeze_backward_planes_kernel(const SqueezeBackwardArguments a) {
  SENET_SHARED(float, scratch, kScratch);
  SENET_SHARED(float, dgate, kFlatChannels);
  release_dependents();
  const TileAt at(a.g, blockIdx.x);
  const int lane = thread_index() % a.g.lanes, groups = kThreads / a.g.lanes;
  for (int k0 = 0; k0 < at.channels; k0 += groups) {
    const int k = k0 + thread_index() / a.g.lanes;
    float total[kPack] = {};
    if (k < at.channels)
      over_plane_pairs<T>(a, at, k, lane, [&](int, int, const Pair8<T>& v) { add_products(v, total); });
    const float sum = group_sum(sum_of(total), a.g.lanes, scratch);
    if (lane == 0 && k < at.channels) dgate[k] = sum;
  }
  __syncthreads();
  finish_squeeze_backward(a, at, dgate, flat_stride(a.g), scratch);
}

template <class T>
__global__ void __launch_bounds__(kThreads, 3)
    squeeze_backward_tile_of_planes_kernel(const SqueezeBackwardArguments a) {
  SENET_SHARED(float, scratch, kScratch);
  SENET_SHARED(float, dgate, kFlatChannels);
  SENET_DYNAMIC_SHARED(memory);
  release_dependents();
  const TileAt at(a.g, blockIdx.x);
  const int lane = thread_index() % a.g.lanes, groups = kThreads / a.g.lanes;
  const StagedPairs<T> staged(reinterpret_cast<T*>(memory), a, at);
  for (int k0 = 0; k0 < at.channels; k0 += groups) {
    const int k = k0 + thread_index() / a.g.lanes;
    float sum = 0.0f;
    if (k < at.channels) staged.over_plane(a, at, k, lane, [&](float x, float dy) { sum += x * dy; });
    sum = group_sum(sum, a.g.lanes, scratch);
    if (lane == 0 && k < at.channels) dgate[k] = sum;
  }
  __syncthreads();
  finish_squeeze_backward(a, at, dgate, flat_stride(a.g), scratch);
}

}  // namespace senet::cuda
