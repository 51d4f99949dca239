// The excitation's own launches, between the sweeps, for the "launches" strategy: kMostSamples samples and
// kExciteChannels channels to a block.
#pragma once
#include "excite.cuh"
#include "weight_gradients.cuh"

namespace senet::cuda {

struct ExciteArguments {
  int64_t n;
  int splits;
  const float* parts;  // of pooled (forward) or dlogit (backward), [n, splits, c]
  int64_t parts_stride;
  const float *peaks, *ties;  // of the splits, with a peak (forward)
  Squeeze squeeze;
  float *pooled, *peak, *tied;  // what is kept, or null; with the stride of saved
  int64_t saved_stride;
  Bottleneck excite;
  float* out;  // gate or dpooled, [n, c]; null where dpooled is not wanted
  WeightArguments weights;
  unsigned weight_tiles;  // the first so many blocks of the backward's second launch
};

// The maximum over the splits and how many positions attain it; NaN where a split has NaN ties.
__device__ __forceinline__ float2 merge_peaks(const float* peaks, const float* ties, int splits, int c) {
  float top = -INFINITY, count = 0.0f;
  for (int split = 0; split < splits; ++split) {
    const float peak = peaks[static_cast<int64_t>(split) * c], tied = ties[static_cast<int64_t>(split) * c];
    count = (top >= peak ? count : count * 0.0f) + (peak >= top ? tied : tied * 0.0f);
    top = fmaxf(top, peak);
  }
  return make_float2(count == count ? top : count, count);
}

// Sums the parts of pooled over the splits, keeps them, and pushes a share of (E2).
__global__ void __launch_bounds__(kThreads, 2) excite_push_kernel(const ExciteArguments a) {
  SENET_SHARED(float, pooled, kMostSamples* kBlockC);
  const Patch at = patch_at<kBlockC>(a.n, a.excite.c, blockIdx.x);
  wait_for_previous();
  release_dependents();
  for (int i = thread_index(); i < kMostSamples * kBlockC; i += kThreads) {
    const int s = i / kBlockC, k = i % kBlockC, c = at.c0 + k;
    const int64_t n = at.n0 + s;
    float v = 0.0f;
    if (s < at.samples && k < at.channels) {
      v = sum_splits(a.parts + n * a.parts_stride + c, a.splits, a.excite.c);
      if (a.squeeze != Squeeze::avg) {
        const int64_t first = n * a.splits * a.excite.c + c;
        const float2 top = merge_peaks(a.peaks + first, a.ties + first, a.splits, a.excite.c);
        v = a.squeeze == Squeeze::max ? top.x : 0.5f * v + 0.5f * top.x;
        if (a.pooled != nullptr) a.peak[n * a.saved_stride + c] = top.x, a.tied[n * a.saved_stride + c] = top.y;
      }
      if (a.pooled != nullptr) a.pooled[n * a.saved_stride + c] = v;
    }
    pooled[i] = v;
  }
  __syncthreads();
  push_preact<ByItself>(a.excite, at, pooled, kBlockC);
}

// (E2), (E3) from the shares.
__global__ void __launch_bounds__(kThreads, 2) excite_gate_kernel(const ExciteArguments a) {
  SENET_SHARED(float, scratch, kProductScratch<ByItself>);
  SENET_SHARED(float, gates, kMostSamples* kBlockC);
  SENET_SHARED(float, hidden, kMostSamples* kReduced);
  const Patch at = patch_at<kBlockC>(a.n, a.excite.c, blockIdx.x);
  wait_for_previous();
  release_dependents();
  make_gates<ByItself>(a.excite, at, false, gates, kBlockC, hidden, scratch);
  for (int i = thread_index(); i < at.samples * at.channels; i += kThreads) {
    const int s = i / at.channels, c = i % at.channels;
    a.out[(at.n0 + s) * a.excite.c + at.c0 + c] = gates[s * kBlockC + c];
  }
}

// Sums the parts of dlogit over the splits, and pushes a share of (B4).
__global__ void __launch_bounds__(kThreads, 2) excite_push_backward_kernel(const ExciteArguments a) {
  SENET_SHARED(float, scratch, kProductScratch<ByItself>);
  SENET_SHARED(float, dlogit, kMostSamples* kBlockC);
  const Patch at = patch_at<kBlockC>(a.n, a.excite.c, blockIdx.x);
  wait_for_previous();
  release_dependents();
  for (int i = thread_index(); i < kMostSamples * kBlockC; i += kThreads) {
    const int s = i / kBlockC, k = i % kBlockC;
    const bool there = s < at.samples && k < at.channels;
    dlogit[i] =
        there ? sum_splits(a.parts + (at.n0 + s) * a.splits * a.excite.c + at.c0 + k, a.splits, a.excite.c) : 0.0f;
  }
  __syncthreads();
  push_dhidden<ByItself>(a.excite, at, dlogit, kBlockC, scratch);
}

// From the shares: in the first blocks (B7), in the others (B4), (B5).
__global__ void __launch_bounds__(kThreads, 2) excite_backward_kernel(const ExciteArguments a) {
  SENET_SHARED(float, scratch, kProductScratch<ByItself>);
  SENET_SHARED(float, vectors, kWeightMemory);
  SENET_SHARED(float, block, kMostSamples* kReduced);
  wait_for_previous();
  release_dependents();
  if (blockIdx.x < a.weight_tiles) return weight_gradients(a.excite, a.weights, blockIdx.x, vectors);
  const Patch at = patch_at<kBlockC>(a.n, a.excite.c, blockIdx.x - a.weight_tiles);
  make_dpooled<ByItself>(a.excite, at, nullptr, vectors, kBlockC, block, scratch);
  for (int i = thread_index(); i < at.samples * at.channels; i += kThreads) {
    const int s = i / at.channels, c = i % at.channels;
    a.out[(at.n0 + s) * a.excite.c + at.c0 + c] = vectors[s * kBlockC + c];
  }
}

}  // namespace senet::cuda
