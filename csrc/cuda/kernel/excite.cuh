// The excitation and its backward on blocks of [samples, channels], for every strategy; equation numbers are those of
// senet_fused/reference.py. Shares are the parts of w1 @ pooled (or of dlogit @ w2) of single tiles: [n, tiles, r].
#pragma once
#include <cstdint>

#include "../../plan/cuda_plan.h"
#include "../prim/function.cuh"
#include "../prim/product.cuh"
#include "tile.cuh"

namespace senet::cuda {

constexpr int kBlockC = static_cast<int>(kExciteChannels);  // of a block of the excitation's own launches
constexpr int kReduced =
    256;  // squeezed channels at a time: hidden and dpreact are [samples][kReduced] in shared memory

// A block of samples and channels, and which one it is of those of its samples.
struct Patch {
  int64_t n0;
  int samples, most_samples;  // that there are, that there may be
  int c0, channels, t;
};
__device__ __forceinline__ Patch patch_of(const Geometry& g, const TileAt& at) {
  return {at.n0, at.samples, g.samples, at.c0, at.channels, at.t};
}
// Of blocks of kMostSamples samples and kWidth channels.
template <int kWidth>
__device__ __forceinline__ Patch patch_at(int64_t n, int c, unsigned block) {
  const int across = (c + kWidth - 1) / kWidth, t = block % across;
  const int64_t n0 = static_cast<int64_t>(block / across) * kMostSamples;
  const int samples = static_cast<int>(min(static_cast<int64_t>(kMostSamples), n - n0)), c0 = t * kWidth;
  return {n0, samples, kMostSamples, c0, min(kWidth, c - c0), t};
}

struct Bottleneck {
  int c, r;
  Matrix w1, w2;
  Vector b1, b2;
  Elementwise act, gate;
  float* shares;  // [n, tiles, r]
  int tiles;
  float* preact;  // kept, in front of act, or null
  int64_t preact_stride;
};

__device__ __forceinline__ float sum_splits(const float* parts, int splits, int c) {
  float sum = 0.0f;
#pragma unroll 8
  for (int split = 0; split < splits; ++split) sum += parts[static_cast<int64_t>(split) * c];
  return sum;
}

// (E2): this tile's share of w1 @ pooled. pooled: [samples][stride] in shared memory.
template <class Size>
__device__ __forceinline__ void push_preact(const Bottleneck& b, const Patch& at, const float* pooled, int stride) {
  rows_dot<Size>(b.w1, at.c0, b.c, b.r, at.channels, pooled, stride, at.samples,
                 [&](int s, int r, float sum) { b.shares[((at.n0 + s) * b.tiles + at.t) * b.r + r] = sum; });
}

// (B4): this tile's share of dlogit @ w2.
template <class Size>
__device__ __forceinline__ void push_dhidden(const Bottleneck& b, const Patch& at, const float* dlogit, int stride,
                                             float* scratch) {
  columns_dot<Size>(b.w2, static_cast<int64_t>(at.c0) * b.r, b.r, b.r, at.channels, dlogit, stride, at.samples, scratch,
                    [&](int s, int r, float sum) { b.shares[((at.n0 + s) * b.tiles + at.t) * b.r + r] = sum; });
}

// out(sample, r, sum of the shares) for r in [r0, r0 + count), all samples at once. How the shares are summed depends
// on how many samples there may be, not on how many there are. scratch: 4 * kThreads floats.
template <class Out>
__device__ __forceinline__ void sum_shares(const Bottleneck& b, const Patch& at, int r0, int count, float* scratch,
                                           Out out) {
  const int quads = (count + 3) / 4;
  const float* shares = b.shares + at.n0 * b.tiles * b.r + r0;
  const auto take = [&](int i, const float4& sum) {
    const int s = i / quads, r = i % quads * 4;
    if (s >= at.samples) return;
    const float sums[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (r + j < count) out(s, r + j, sums[j]);
  };
  // A sample that is not there reads the last one, and is not taken.
  const auto row_of = [&](int row, int i) {
    return shares + (static_cast<int64_t>(min(i / quads, at.samples - 1)) * b.tiles + row) * b.r + i % quads * 4;
  };
  if (b.r % 4 == 0)
    sum_rows(
        b.tiles, at.most_samples * quads, scratch, [&](int row, int i) { return floats_at<true>(row_of(row, i), 4); },
        take);
  else
    sum_rows(
        b.tiles, at.most_samples * quads, scratch,
        [&](int row, int i) { return floats_at<false>(row_of(row, i), count - i % quads * 4); }, take);
}

// (E2) for all squeezed channels, or (B4): what the last block of a group of samples does. finish(sample, r, sum).
template <class Finish>
__device__ __forceinline__ void finish_shares(const Bottleneck& b, const Patch& at, float* scratch, Finish finish) {
  for (int r0 = 0; r0 < b.r; r0 += kReduced)
    sum_shares(b, at, r0, min(kReduced, b.r - r0), scratch, [&](int s, int i, float sum) { finish(s, r0 + i, sum); });
}

// Pushes this tile's share of (E2); the last block of a group of samples, where they are counted, adds them up.
template <class Size>
__device__ __forceinline__ void share_preact(const Bottleneck& b, const Patch& at, const float* pooled, int stride,
                                             float* scratch, int* counters, int group, int blocks) {
  push_preact<Size>(b, at, pooled, stride);
  if (counters != nullptr && is_last_block(counters + group, blocks))
    finish_shares(b, at, scratch, [&](int s, int r, float sum) {
      if (b.b1.is_there()) sum += b.b1[r];
      b.preact[(at.n0 + s) * b.preact_stride + r] = sum;
    });
}

// As share_preact, of (B4). dpreact: [n, r].
template <class Size>
__device__ __forceinline__ void share_dhidden(const Bottleneck& b, const Patch& at, const float* dlogit, int stride,
                                              float* scratch, float* dpreact, int* counters, int group, int blocks) {
  push_dhidden<Size>(b, at, dlogit, stride, scratch);
  if (counters != nullptr && is_last_block(counters + group, blocks))
    finish_shares(b, at, scratch, [&](int s, int r, float sum) {
      const int64_t n = at.n0 + s;
      dpreact[n * b.r + r] = through_act(b.act, sum, b.preact[n * b.preact_stride + r]);
    });
}

// (E2), (E3): gates [samples][stride] in shared memory. ready: preact is there already, else it is the sum of the
// shares, and kept by the block that is to. hidden: [kMostSamples or 1][kReduced]. Ends behind a barrier.
template <class Size>
__device__ __forceinline__ void make_gates(const Bottleneck& b, const Patch& at, bool ready, float* gates, int stride,
                                           float* hidden, float* scratch) {
  for (int r0 = 0; r0 < b.r; r0 += kReduced) {
    const int count = min(kReduced, b.r - r0);
    if (ready) {
      for (int i = thread_index(); i < at.samples * count; i += kThreads) {
        const int s = i / count, r = i % count;
        hidden[s * kReduced + r] = apply(b.act, b.preact[(at.n0 + s) * b.preact_stride + r0 + r]);
      }
    } else {
      sum_shares(b, at, r0, count, scratch, [&](int s, int r, float sum) {
        if (b.b1.is_there()) sum += b.b1[r0 + r];
        if (b.preact != nullptr && at.t == 0) b.preact[(at.n0 + s) * b.preact_stride + r0 + r] = sum;
        hidden[s * kReduced + r] = apply(b.act, sum);
      });
    }
    if (thread_index() < at.samples * 4 && count % 4 != 0) {
      const int r = count / 4 * 4 + thread_index() % 4;  // up to a multiple of 4
      if (r >= count) hidden[thread_index() / 4 * kReduced + r] = 0.0f;
    }
    __syncthreads();
    rows_dot<Size>(b.w2, static_cast<int64_t>(at.c0) * b.r + r0, b.r, at.channels, count, hidden, kReduced, at.samples,
                   [&](int s, int c, float sum) {
                     float& gate = gates[s * stride + c];
                     gate = sum + (r0 != 0 ? gate : b.b2.is_there() ? b.b2[at.c0 + c] : 0.0f);
                   });
    __syncthreads();
  }
  for (int i = thread_index(); i < at.samples * at.channels; i += kThreads) {
    float& gate = gates[i / at.channels * stride + i % at.channels];
    gate = apply(b.gate, gate);
  }
  __syncthreads();
}

// (B4), (B5): dpooled [samples][stride] in shared memory. ready: dpreact is there already. dpreact: in global memory if
// ready, [n, r]. block: [kMostSamples or 1][kReduced]. Ends behind a barrier.
template <class Size>
__device__ __forceinline__ void make_dpooled(const Bottleneck& b, const Patch& at, const float* dpreact, float* dpooled,
                                             int stride, float* block, float* scratch) {
  for (int r0 = 0; r0 < b.r; r0 += kReduced) {
    const int count = min(kReduced, b.r - r0);
    if (dpreact != nullptr) {
      for (int i = thread_index(); i < at.samples * count; i += kThreads) {
        const int s = i / count, r = i % count;
        block[s * kReduced + r] = dpreact[(at.n0 + s) * b.r + r0 + r];
      }
    } else {
      sum_shares(b, at, r0, count, scratch, [&](int s, int r, float sum) {
        block[s * kReduced + r] = through_act(b.act, sum, b.preact[(at.n0 + s) * b.preact_stride + r0 + r]);
      });
    }
    __syncthreads();
    columns_dot<Size>(b.w1, static_cast<int64_t>(r0) * b.c + at.c0, b.c, at.channels, count, block, kReduced,
                      at.samples, scratch, [&](int s, int c, float sum) {
                        float& to = dpooled[s * stride + c];
                        to = sum + (r0 != 0 ? to : 0.0f);
                      });
  }
}

}  // namespace senet::cuda
