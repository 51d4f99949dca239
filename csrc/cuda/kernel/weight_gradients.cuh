// (B7): the weight gradients, a tile of channels and squeezed channels per block, summed over all samples in their
// order.
#pragma once
#include "excite.cuh"

namespace senet::cuda {

constexpr int kTileC = static_cast<int>(kWeightChannels), kTileR = static_cast<int>(kWeightReduced);
constexpr int kChunk = 32;  // samples at a time
constexpr int kWeightMemory = 2 * kChunk * (kTileC + kTileR);

struct WeightArguments {
  int64_t n;
  int splits;           // parts of dlogit to a sample
  const float* pooled;  // [n, c]
  int64_t pooled_stride;
  bool affine;           // pooled is scale * that + shift, of block tails
  Vector scale, shift;   // [c], or none: ones, zeros
  const float* parts;    // of dlogit, [n, splits, c]
  const float* dpreact;  // [n, r], or null: the sum of the shares through act
  void *dw1, *dw2;       // in the weights' dtype
  Target db1, db2;
  bool wide;  // all vectors can be read four floats at a time
};

// sum of rows at(0), at(1), ...; kAtOnce are loaded before the first is added.
template <int kAtOnce, class At>
__device__ __forceinline__ float4 sum_of_rows(int rows, At at) {
  float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  for (int row = 0; row < rows; row += kAtOnce) {
    float4 v[kAtOnce];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) v[u] = at(min(row + u, rows - 1));
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u)
      if (row + u < rows) add(sum, v[u]);
  }
  return sum;
}

// The first `count` of four, the others zero.
__device__ __forceinline__ float4 first_of(const float4& v, int count) {
  return make_float4(count > 0 ? v.x : 0.0f, count > 1 ? v.y : 0.0f, count > 2 ? v.z : 0.0f, count > 3 ? v.w : 0.0f);
}

// The first `count` of four elements from `at` on, at least one, the last of them again in place of the others.
__device__ __forceinline__ float4 quad_of(const Vector& v, int64_t at, int count) {
  return make_float4(v[at], v[at + min(1, count - 1)], v[at + min(2, count - 1)], v[at + min(3, count - 1)]);
}

__device__ __forceinline__ float4 through_affine(const WeightArguments& a, float4 v, int64_t c, int count) {
  if (a.scale.is_there()) {
    const float4 scale = quad_of(a.scale, c, count);
    v.x *= scale.x, v.y *= scale.y, v.z *= scale.z, v.w *= scale.w;
  }
  if (a.shift.is_there()) add(v, quad_of(a.shift, c, count));
  return v;
}

// Samples [n0, n0 + kChunk) of the vectors that the tile needs, in shared memory, zero beyond the last one.
template <bool kWide>
__device__ __forceinline__ void load_chunk(const Bottleneck& b, const WeightArguments& a, int64_t n0, int c0, int r0,
                                           float (*pooled)[kTileC], float (*dlogit)[kTileC], float (*dpreact)[kTileR],
                                           float (*hidden)[kTileR]) {
  for (int i = thread_index(); i < kChunk * kTileC / 4; i += kThreads) {
    // What is not there is read from the first sample or channel instead, and becomes zero.
    const int s = i / (kTileC / 4), k = i % (kTileC / 4) * 4, count = n0 + s < a.n ? min(4, b.c - c0 - k) : 0;
    const int64_t n = count > 0 ? n0 + s : 0, c = count > 0 ? c0 + k : 0;
    const int some = count > 0 ? count : 1;
    const float* parts = a.parts + n * a.splits * b.c + c;
    float4 p = floats_at<kWide>(a.pooled + n * a.pooled_stride + c, some);
    if (a.affine) p = through_affine(a, p, c, some);
    const float4 sum = sum_of_rows<4>(
        a.splits, [&](int split) { return floats_at<kWide>(parts + static_cast<int64_t>(split) * b.c, some); });
    *reinterpret_cast<float4*>(&pooled[s][k]) = first_of(p, count);
    *reinterpret_cast<float4*>(&dlogit[s][k]) = first_of(sum, count);
  }
  for (int i = thread_index(); i < kChunk * kTileR / 4; i += kThreads) {
    const int s = i / (kTileR / 4), k = i % (kTileR / 4) * 4, count = n0 + s < a.n ? min(4, b.r - r0 - k) : 0;
    const int64_t n = count > 0 ? n0 + s : 0, r = count > 0 ? r0 + k : 0;
    const int some = count > 0 ? count : 1;
    const bool ready = a.dpreact != nullptr;
    const float* rows = ready ? a.dpreact + n * b.r + r : b.shares + n * b.tiles * b.r + r;
    const float4 preact = floats_at<kWide>(b.preact + n * b.preact_stride + r, some);
    const float4 sum = sum_of_rows<8>(
        ready ? 1 : b.tiles, [&](int t) { return floats_at<kWide>(rows + static_cast<int64_t>(t) * b.r, some); });
    const float at[4] = {preact.x, preact.y, preact.z, preact.w}, d[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const bool there = j < count;
      dpreact[s][k + j] = !there ? 0.0f : ready ? d[j] : through_act(b.act, d[j], at[j]);
      hidden[s][k + j] = there ? apply(b.act, at[j]) : 0.0f;
    }
  }
}

// memory: kWeightMemory floats.
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
    if (a.wide)
      load_chunk<true>(b, a, n0, c0, r0, pooled, dlogit, dpreact, hidden);
    else
      load_chunk<false>(b, a, n0, c0, r0, pooled, dlogit, dpreact, hidden);
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
  if (a.db1.is_there() && c0 == 0 && thread_index() < kTileR && r0 + thread_index() < b.r)
    a.db1.store(r0 + thread_index(), s1);
  if (a.db2.is_there() && r0 == 0 && thread_index() < kTileC && c0 + thread_index() < b.c)
    a.db2.store(c0 + thread_index(), s2);
}

}  // namespace senet::cuda
