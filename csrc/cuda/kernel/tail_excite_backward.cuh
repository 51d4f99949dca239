// Between the sweeps of a block tail's backward: (B7) in the first blocks, in the others (B4), (B5) and the parts of
// (T6), for kBlockC channels and kMostSamples samples to a block.
#pragma once
#include "excite.cuh"
#include "tail.cuh"
#include "weight_gradients.cuh"

namespace senet::cuda {

struct TailExciteBackwardArguments {
  int64_t n;
  int splits;
  Norm norm;
  const float *g0, *g1;  // [n, splits, c]
  const float* gate;     // [n, c], or null: none
  const float* pooled;   // what is kept in its place: the mean of xhat, [n, c]
  int64_t saved_stride;
  Bottleneck excite;
  const float* dpreact;              // "last_block": [n, r]; or null, the sum of the shares
  float* dpooled;                    // [n, c]
  float *parts_weight, *parts_bias;  // [groups of samples, c]
  WeightArguments weights;
  unsigned weight_tiles;  // the first so many blocks
};

// (T6) over the block's samples. dpooled, terms: [kMostSamples][kBlockC], terms for each of the two.
__device__ __forceinline__ void sum_samples(const TailExciteBackwardArguments& a, const Patch& at, unsigned group,
                                            const float* dpooled, float* weight_terms, float* bias_terms) {
  for (int i = thread_index(); i < at.samples * kBlockC; i += kThreads) {
    const int s = i / kBlockC, k = i % kBlockC, c = at.c0 + k;
    if (k >= at.channels) continue;
    const int64_t n = at.n0 + s, nc = n * a.norm.c + c, first = n * a.splits * a.norm.c + c;
    const float g0 = sum_splits(a.g0 + first, a.splits, a.norm.c), g1 = sum_splits(a.g1 + first, a.splits, a.norm.c);
    weight_terms[i] = g1;
    bias_terms[i] = g0;
    if (a.gate == nullptr) continue;
    const float gate = a.gate[nc], d = dpooled[i];
    weight_terms[i] = gate * g1 + d * a.pooled[n * a.saved_stride + c];
    bias_terms[i] = gate * g0 + d;
    a.dpooled[nc] = d;
  }
  __syncthreads();
  if (thread_index() >= 2 * kBlockC || thread_index() % kBlockC >= at.channels) return;
  const bool of_weight = thread_index() < kBlockC;
  const float* terms = (of_weight ? weight_terms : bias_terms) + thread_index() % kBlockC;
  float sum = 0.0f;
  for (int s = 0; s < at.samples; ++s) sum += terms[s * kBlockC];
  const int64_t to = static_cast<int64_t>(group) * a.norm.c + at.c0 + thread_index() % kBlockC;
  (of_weight ? a.parts_weight : a.parts_bias)[to] = sum;
}

__global__ void __launch_bounds__(kThreads, 2) tail_excite_backward_kernel(const TailExciteBackwardArguments a) {
  SENET_SHARED(float, scratch, kProductScratch<ByItself>);
  SENET_SHARED(float, vectors, kWeightMemory);
  SENET_SHARED(float, block, kMostSamples* kReduced);
  constexpr int kVector = kMostSamples * kBlockC;
  static_assert(kWeightMemory >= 3 * kVector && kThreads >= 2 * kBlockC, "vectors share the memory");
  wait_for_previous();
  release_dependents();
  if (blockIdx.x < a.weight_tiles) return weight_gradients(a.excite, a.weights, blockIdx.x, vectors);
  const unsigned index = blockIdx.x - a.weight_tiles, across = (a.norm.c + kBlockC - 1) / kBlockC;
  const Patch at = patch_at<kBlockC>(a.n, a.norm.c, index);
  if (a.gate != nullptr) make_dpooled<ByItself>(a.excite, at, a.dpreact, vectors, kBlockC, block, scratch);
  sum_samples(a, at, index / across, vectors, vectors + kVector, vectors + 2 * kVector);
}

}  // namespace senet::cuda
