// The second sweep of a block tail's backward: what remains of (T6), and (T7).
#pragma once
#include "scale_backward_sweep.cuh"
#include "tail.cuh"

namespace senet::cuda {

struct TailApplyBackwardArguments : ScaleBackwardSweep {
  Norm norm;
  const float *gate, *dpooled;             // [n, c], or null: none
  const float *parts_weight, *parts_bias;  // [groups, c], or null: neither x nor anyone else wants them
  int64_t groups;
  Target dweight, dbias;   // [c], or none; the tiles of the first samples and the first split store them
  float inv_m, inv_count;  // inv_count: 1 / m of (T7)
};

// (T6) of the tile's channels: the sums of both parts over the groups of samples, in an order that the tile decides.
// Ends behind a barrier.
__device__ __forceinline__ void sum_groups(const TailApplyBackwardArguments& a, const TileAt& at, float* dweight,
                                           float* dbias) {
  const int items = 2 * at.channels, lanes = max(1, min(32, kThreads / power_at_least(items)));
  const int lane = thread_index() % lanes;
  for (int i0 = 0; i0 < items; i0 += kThreads / lanes) {
    const int i = i0 + thread_index() / lanes, k = i < at.channels ? i : i - at.channels;
    const float* parts = (i < at.channels ? a.parts_weight : a.parts_bias) + at.c0 + k;
    float sum = 0.0f;
    if (i < items) {
#pragma unroll 8
      for (int64_t group = lane; group < a.groups; group += lanes) sum += __ldcg(parts + group * a.g.c);
    }
    sum = group_sum(sum, lanes, nullptr);
    if (lane == 0 && i < items) (i < at.channels ? dweight : dbias)[k] = sum;
  }
  __syncthreads();
}

// The vectors of a tile in shared memory: P and T of (T7), [samples][channels], mu, Q and dbias / m, [channels], each
// in kSize floats.
template <int kSize>
__device__ __forceinline__ void gradient_columns(const TailApplyBackwardArguments& a, const TileAt& at,
                                                 float* vectors) {
  float *gate = vectors, *even = vectors + kSize, *shift = vectors + 4 * kSize;
  const bool stores = at.split == 0 && at.group == 0, sums = a.parts_weight != nullptr && (a.centred || stores);
  float* slope = vectors + 3 * kSize;
  if (sums) sum_groups(a, at, slope, shift);
  for (int k = thread_index(); k < at.channels; k += kThreads) {
    const int c = at.c0 + k;
    const float dweight = sums ? slope[k] : 0.0f, dbias = sums ? shift[k] : 0.0f, rstd = a.norm.rstd_at(c);
    if (stores && a.dweight.is_there()) a.dweight.store(c, dweight);
    if (stores && a.dbias.is_there()) a.dbias.store(c, dbias);
    vectors[2 * kSize + k] = a.norm.mean_at(c);
    slope[k] = -(a.norm.weight_at(c) * (rstd * rstd)) * (dweight * a.inv_count);
    shift[k] = a.centred ? dbias * a.inv_count : 0.0f;
  }
  __syncthreads();
  if (a.dx == nullptr) return;
  for (int i = thread_index(); i < at.samples * at.channels; i += kThreads) {
    const int s = i / at.channels, k = i % at.channels, c = at.c0 + k, own = s * a.g.channels + k;
    const int64_t n = at.n0 + s, nc = n * a.g.c + c;
    const float scale = a.norm.weight_at(c) * a.norm.rstd_at(c);
    gate[own] = (a.gate != nullptr ? a.gate[nc] : 1.0f) * a.norm.factor_at(n) * scale;
    even[own] = scale * ((a.gate != nullptr ? a.dpooled[nc] * a.inv_m : 0.0f) - shift[k]);
  }
  __syncthreads();
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    tail_apply_backward_channels_last_kernel(const TailApplyBackwardArguments a) {
  SENET_SHARED(float, vectors, 5 * kMaxColumns);
  wait_for_previous();
  const TileAt at(a.g, gridDim.x - 1 - blockIdx.x);
  const Column mine(a.g, at);
  gradient_columns<kMaxColumns>(a, at, vectors);
  if (!mine.active || (a.dx == nullptr && a.dresidual == nullptr)) return;
  scale_backward_column<T>(a, at, mine, columns_of<Gradient::tail>(a, mine, vectors, kMaxColumns));
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) tail_apply_backward_planes_kernel(const TailApplyBackwardArguments a) {
  SENET_SHARED(float, vectors, 5 * kFlatChannels);
  wait_for_previous();
  const TileAt at(a.g, gridDim.x - 1 - blockIdx.x);
  gradient_columns<kFlatChannels>(a, at, vectors);
  if (a.dx == nullptr && a.dresidual == nullptr) return;
  scale_backward_planes<T, Gradient::tail>(a, at, vectors);
}

}  // namespace senet::cuda
