// The second sweep of the backward: (B4) to (B6), and (B7) in the first blocks of the launch.
#pragma once
#include "excite.cuh"
#include "scale_backward_sweep.cuh"
#include "weight_gradients.cuh"

namespace senet::cuda {

static_assert(kWeightMemory >= 2 * kMaxColumns && kWeightMemory >= 4 * kFlatChannels, "vectors share the memory");

struct ScaleBackwardArguments : ScaleBackwardSweep {
  const float* gate;  // [n, c]
  Bottleneck excite;
  const float* dpreact;       // "last_block": [n, r]
  const float* dpooled;       // "launches": [n, c]
  const float *peaks, *ties;  // [n, c] with a stride of their own, with a peak
  int64_t peaks_stride;
  float inv_m;
  bool half;  // of the gradient goes to the peak, the other half to all
  CudaStrategy strategy;
  WeightArguments weights;
  unsigned weight_tiles;  // the first so many blocks
};

// gate, even, top and each of the tile's channels, four vectors of [samples][stride] in shared memory (two without a
// peak), `apart` from each other.
template <bool kPeak>
__device__ __forceinline__ void make_columns(const ScaleBackwardArguments& a, const TileAt& at, float* vectors,
                                             int apart, int stride, float* block, float* scratch) {
  float *gate = vectors, *even = vectors + apart;
  if (a.dx == nullptr) return;
  if constexpr (!kPeak)  // with a peak the launches between the sweeps have made it
    if (a.strategy != CudaStrategy::launches)
      make_dpooled<InSweep>(a.excite, patch_of(a.g, at), a.strategy == CudaStrategy::last_block ? a.dpreact : nullptr,
                            even, stride, block, scratch);
  for (int i = thread_index(); i < at.samples * at.channels; i += kThreads) {
    const int s = i / at.channels, c = i % at.channels, k = s * stride + c;
    const int64_t n = at.n0 + s, nc = n * a.g.c + at.c0 + c;
    const float dpooled = a.strategy == CudaStrategy::launches ? a.dpooled[nc] : even[k];
    gate[k] = a.gate[nc];
    even[k] = kPeak && !a.half ? 0.0f : dpooled * a.inv_m * (kPeak ? 0.5f : 1.0f);
    if constexpr (kPeak) {
      vectors[2 * apart + k] = a.peaks[n * a.peaks_stride + at.c0 + c];
      vectors[3 * apart + k] = dpooled / a.ties[n * a.peaks_stride + at.c0 + c] * (a.half ? 0.5f : 1.0f);
    }
  }
  __syncthreads();
}

template <class T, bool kPeak>
__global__ void __launch_bounds__(kThreads, 2) scale_backward_channels_last_kernel(const ScaleBackwardArguments a) {
  SENET_SHARED(float, scratch, kScratch);
  SENET_SHARED(float, vectors, kPeak ? 4 * kMaxColumns : kWeightMemory);
  SENET_SHARED(float, block, kMostSamples* kReduced);
  wait_for_previous();
  if (blockIdx.x < a.weight_tiles) return weight_gradients(a.excite, a.weights, blockIdx.x, vectors);
  const TileAt at(a.g, gridDim.x - 1 - blockIdx.x);
  const Column mine(a.g, at);
  const int apart = a.g.samples * a.g.channels;
  make_columns<kPeak>(a, at, vectors, apart, a.g.channels, block, scratch);
  if (!mine.active) return;
  constexpr Gradient kOf = kPeak ? Gradient::peak : Gradient::mean;
  scale_backward_column<T, kOf>(a, at, mine, columns_of<kOf>(a, mine, vectors, apart));
}

template <class T, bool kPeak>
__global__ void __launch_bounds__(kThreads, 2) scale_backward_planes_kernel(const ScaleBackwardArguments a) {
  SENET_SHARED(float, scratch, kScratch);
  SENET_SHARED(float, vectors, kWeightMemory);
  SENET_SHARED(float, block, kReduced);
  wait_for_previous();
  if (blockIdx.x < a.weight_tiles) return weight_gradients(a.excite, a.weights, blockIdx.x, vectors);
  const TileAt at(a.g, gridDim.x - 1 - blockIdx.x);
  make_columns<kPeak>(a, at, vectors, kFlatChannels, a.g.channels, block, scratch);
  scale_backward_planes<T, kPeak ? Gradient::peak : Gradient::mean>(a, at, vectors);
}

}  // namespace senet::cuda
