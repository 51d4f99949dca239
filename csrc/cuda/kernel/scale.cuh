// The second sweep of the forward: (E2), (E3) where no launch between the sweeps has made the gate, and (E4).
#pragma once
#include "excite.cuh"
#include "scale_sweep.cuh"

namespace senet::cuda {

struct ScaleArguments : ScaleSweep {
  const float* parts;  // to be summed and kept, [n, splits, c], or null
  float* pooled;       // where they go
  int64_t pooled_stride;
  Bottleneck excite;
  float* gate;  // [n, c], or null
  CudaStrategy strategy;
};

// The gates of a tile, [samples][stride] in shared memory: those that a launch between the sweeps has made, or made
// here, and kept by the tiles of the first split. use(sample, channel, gate) gives what is put in a gate's place.
template <class Use>
__device__ __forceinline__ void gates_of(const Bottleneck& b, CudaStrategy strategy, float* kept, const Geometry& g,
                                         const TileAt& at, float* gates, int stride, float* hidden, float* scratch,
                                         Use use) {
  const bool launched = strategy == CudaStrategy::launches;
  if (!launched)
    make_gates<InSweep>(b, patch_of(g, at), strategy == CudaStrategy::last_block, gates, stride, hidden, scratch);
  for (int i = thread_index(); i < at.samples * at.channels; i += kThreads) {
    const int s = i / at.channels, c = i % at.channels;
    const int64_t nc = (at.n0 + s) * g.c + at.c0 + c;
    const float gate = launched ? kept[nc] : gates[s * stride + c];
    if (!launched && at.split == 0 && kept != nullptr) kept[nc] = gate;
    gates[s * stride + c] = use(s, c, gate);
  }
  __syncthreads();
}

// Of an SE layer; and what is kept of pooled.
__device__ __forceinline__ void gates_of(const ScaleArguments& a, const TileAt& at, float* gates, int stride,
                                         float* hidden, float* scratch) {
  gates_of(a.excite, a.strategy, a.gate, a.g, at, gates, stride, hidden, scratch, [&](int s, int c, float gate) {
    if (a.parts != nullptr && at.split == 0) {
      const int64_t n = at.n0 + s;
      float sum = 0.0f;
      for (int split = 0; split < a.g.splits; ++split) sum += a.parts[(n * a.g.splits + split) * a.g.c + at.c0 + c];
      a.pooled[n * a.pooled_stride + at.c0 + c] = sum;
    }
    return gate;
  });
}

template <class T>
__global__ void __launch_bounds__(kThreads, 3) scale_channels_last_kernel(const ScaleArguments a) {
  SENET_SHARED(float, scratch, kScratch);
  SENET_SHARED(float, gates, kMaxColumns);
  SENET_SHARED(float, hidden, kMostSamples* kReduced);
  const TileAt at(a.g, gridDim.x - 1 - blockIdx.x);
  const Column mine(a.g, at);
  wait_for_previous();
  gates_of(a, at, gates, a.g.channels, hidden, scratch);
  if (!mine.active) return;
  Factors8<false> of;
#pragma unroll
  for (int j = 0; j < kPack; ++j)
    of.gate[j] = j < mine.count ? gates[mine.sample * a.g.channels + mine.column + j] : 0.0f;
  scale_column<T>(a, at, mine, of);
}

template <class T>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 4 ? 2 : 3) scale_planes_kernel(const ScaleArguments a) {
  SENET_SHARED(float, scratch, kScratch);
  SENET_SHARED(float, gates, kFlatChannels);
  SENET_SHARED(float, hidden, kReduced);
  SENET_SHARED(uint8_t, bits, kFlatElements / 8);
  const TileAt at(a.g, gridDim.x - 1 - blockIdx.x);
  wait_for_previous();
  gates_of(a, at, gates, a.g.channels, hidden, scratch);
  scale_planes<T, false>(a, at, gates, 0, bits);
}

}  // namespace senet::cuda
