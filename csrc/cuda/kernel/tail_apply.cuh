// The second sweep of a block tail's forward: (E2), (E3) where no launch between the sweeps has made the gate, and
// (T3).
#pragma once
#include "scale.cuh"
#include "tail.cuh"

namespace senet::cuda {

struct TailApplyArguments : ScaleSweep {
  Norm norm;
  Bottleneck excite;  // r = 0: no gate
  float* gate;        // [n, c], kept
  CudaStrategy strategy;
};

// gate [samples][stride] and shift, `apart` from it, of (T3) in shared memory.
__device__ __forceinline__ void factors_of(const TailApplyArguments& a, const TileAt& at, float* vectors, int apart,
                                           int stride, float* hidden, float* scratch) {
  if (a.norm.var.is_there() && at.group == 0 && at.split == 0)  // given statistics are kept as those of a batch are
    for (int c = at.c0 + thread_index(); c < at.c0 + at.channels; c += kThreads)
      a.norm.keep(c, a.norm.mean_at(c), a.norm.rstd_at(c), a.norm.var[c]);
  const auto use = [&](int s, int c, float gate) {
    const int k = at.c0 + c;
    const float scaled = gate * a.norm.factor_at(at.n0 + s);
    vectors[apart + s * stride + c] = scaled * a.norm.bias_at(k);
    return scaled * (a.norm.weight_at(k) * a.norm.rstd_at(k));
  };
  if (a.excite.r > 0) return gates_of(a.excite, a.strategy, a.gate, a.g, at, vectors, stride, hidden, scratch, use);
  for (int i = thread_index(); i < at.samples * at.channels; i += kThreads) {
    const int s = i / at.channels, c = i % at.channels;
    vectors[s * stride + c] = use(s, c, 1.0f);
  }
  __syncthreads();
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) tail_apply_channels_last_kernel(const TailApplyArguments a) {
  SENET_SHARED(float, scratch, kScratch);
  SENET_SHARED(float, vectors, 2 * kMaxColumns);
  SENET_SHARED(float, hidden, kMostSamples* kReduced);
  const TileAt at(a.g, gridDim.x - 1 - blockIdx.x);
  const Column mine(a.g, at);
  wait_for_previous();
  factors_of(a, at, vectors, kMaxColumns, a.g.channels, hidden, scratch);
  if (!mine.active) return;
  const int first = mine.sample * a.g.channels + mine.column;
  Factors8<true> of;
#pragma unroll
  for (int j = 0; j < kPack; ++j) {
    const bool there = j < mine.count;
    of.gate[j] = there ? vectors[first + j] : 0.0f;
    of.shift[j] = there ? vectors[kMaxColumns + first + j] : 0.0f;
    of.mean[j] = there ? a.norm.mean_at(mine.c + j) : 0.0f;
  }
  scale_column<T>(a, at, mine, of);
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) tail_apply_planes_kernel(const TailApplyArguments a) {
  SENET_SHARED(float, scratch, kScratch);
  SENET_SHARED(float, vectors, 3 * kFlatChannels);
  SENET_SHARED(float, hidden, kReduced);
  SENET_SHARED(uint8_t, bits, kFlatElements / 8);
  const TileAt at(a.g, gridDim.x - 1 - blockIdx.x);
  wait_for_previous();
  for (int k = thread_index(); k < at.channels; k += kThreads)
    vectors[2 * kFlatChannels + k] = a.norm.mean_at(at.c0 + k);
  factors_of(a, at, vectors, kFlatChannels, a.g.channels, hidden, scratch);
  scale_planes<T, true>(a, at, vectors, kFlatChannels, bits);
}

}  // namespace senet::cuda
