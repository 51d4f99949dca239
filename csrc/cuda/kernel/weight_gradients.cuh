// (B7): the weight gradients, a tile of channels and squeezed channels per block, summed over all samples in their
// order.
#pragma once
#include "excite.cuh"

namespace senet::cuda {

constexpr int kTileC = static_cast<int>(kWeightChannels), kTileR = static_cast<int>(kWeightReduced);
constexpr int kChunk = 16;  // samples at a time

struct WeightArguments {
  int64_t n;
  int splits, tiles;    // parts of dlogit, shares of dpreact to a sample
  const float* pooled;  // [n, c]
  int64_t pooled_stride;
  const float* parts;    // of dlogit, [n, splits, c]
  const float* dpreact;  // [n, r], or null: the sum of the shares through act
  void *dw1, *dw2;       // in the weights' dtype
  float *db1, *db2;      // or null
};

// Samples [n0, n0 + kChunk) of the vectors that the tile needs, in shared memory, zero beyond the last one.
__device__ __forceinline__ void load_chunk(const Bottleneck& b, const WeightArguments& a, int64_t n0, int c0, int r0,
                                           float (*pooled)[kTileC], float (*dlogit)[kTileC], float (*dpreact)[kTileR],
                                           float (*hidden)[kTileR]) {
  for (int i = thread_index(); i < kChunk * kTileC; i += kThreads) {
    const int s = i / kTileC, k = i % kTileC, c = c0 + k;
    const int64_t n = n0 + s;
    const bool there = n < a.n && c < b.c;
    float sum = 0.0f;
    if (there) {
#pragma unroll 4
      for (int split = 0; split < a.splits; ++split) sum += a.parts[(n * a.splits + split) * b.c + c];
    }
    pooled[s][k] = there ? a.pooled[n * a.pooled_stride + c] : 0.0f;
    dlogit[s][k] = sum;
  }
  for (int i = thread_index(); i < kChunk * kTileR; i += kThreads) {
    const int s = i / kTileR, k = i % kTileR, r = r0 + k;
    const int64_t n = n0 + s;
    float d = 0.0f, h = 0.0f;
    if (n < a.n && r < b.r) {
      const float preact = b.preact[n * b.preact_stride + r];
      h = apply(b.act, preact);
      if (a.dpreact != nullptr) {
        d = a.dpreact[n * b.r + r];
      } else {
#pragma unroll 8
        for (int t = 0; t < a.tiles; ++t) d += b.shares[(n * a.tiles + t) * b.r + r];
        d = through_act(b.act, d, preact);
      }
    }
    dpreact[s][k] = d;
    hidden[s][k] = h;
  }
}

// memory: 2 * kChunk * (kTileC + kTileR) floats.
__device__ __forceinline__ void weight_gradients(const Bottleneck& b, const WeightArguments& a, int tile,
                                                 float* memory) {
  const int across = (b.r + kTileR - 1) / kTileR, c0 = tile / across * kTileC, r0 = tile % across * kTileR;
  auto* pooled = reinterpret_cast<float (*)[kTileC]>(memory);
  auto* dlogit = pooled + kChunk;
  auto* dpreact = reinterpret_cast<float (*)[kTileR]>(dlogit + kChunk);
  auto* hidden = dpreact + kChunk;
  // Each thread has 4 channels of 2 squeezed ones.
  const int k = thread_index() % (kTileC / 4) * 4, j = thread_index() / (kTileC / 4) * 2;
  float d1[2][4] = {}, d2[2][4] = {}, s1 = 0.0f, s2 = 0.0f;
  for (int64_t n0 = 0; n0 < a.n; n0 += kChunk) {
    __syncthreads();
    load_chunk(b, a, n0, c0, r0, pooled, dlogit, dpreact, hidden);
    __syncthreads();
    for (int s = 0; s < kChunk; ++s) {
#pragma unroll
      for (int u = 0; u < 2; ++u)
#pragma unroll
        for (int v = 0; v < 4; ++v) {
          d1[u][v] += dpreact[s][j + u] * pooled[s][k + v];
          d2[u][v] += hidden[s][j + u] * dlogit[s][k + v];
        }
      if (thread_index() < kTileR) s1 += dpreact[s][thread_index()];
      if (thread_index() < kTileC) s2 += dlogit[s][thread_index()];
    }
  }
#pragma unroll
  for (int u = 0; u < 2; ++u)
#pragma unroll
    for (int v = 0; v < 4; ++v) {
      const int64_t c = c0 + k + v, r = r0 + j + u;
      if (c >= b.c || r >= b.r) continue;
      store_weight(a.dw1, b.w1.type, r * b.c + c, d1[u][v]);
      store_weight(a.dw2, b.w2.type, c * b.r + r, d2[u][v]);
    }
  if (a.db1 != nullptr && c0 == 0 && thread_index() < kTileR && r0 + thread_index() < b.r)
    a.db1[r0 + thread_index()] = s1;
  if (a.db2 != nullptr && r0 == 0 && thread_index() < kTileC && c0 + thread_index() < b.c)
    a.db2[c0 + thread_index()] = s2;
}

}  // namespace senet::cuda
