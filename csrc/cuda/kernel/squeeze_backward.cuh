// The first sweep of the backward, (B1) to (B3), and each tile's share of (B4).
#pragma once
#include "../prim/bits.cuh"
#include "../prim/walk.cuh"
#include "excite.cuh"

namespace senet::cuda {

struct SqueezeBackwardArguments {
  Geometry g;
  const void *x, *dy;
  int64_t x_stride, dy_stride;
  const uint8_t* mask;  // of the ReLU, or null
  const float* dgate;   // [n, c], or null
  const float* gate;    // [n, c]
  float* parts;         // of dlogit, [n, splits, c]
  Bottleneck excite;    // without shares: "launches"
  float* dpreact;       // "last_block": [n, r]
  int* counters;        // one for each group of samples
};

// x and dy of the same eight elements, and which of them the ReLU let through.
template <class T>
struct Pair8 {
  Pack<T> x, dy;
  uint32_t keep;
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
  push_dhidden<InSweep>(a.excite, patch_of(a.g, at), dgate, stride, scratch);
  if (a.counters != nullptr && is_last_block(a.counters + at.group, at.tiles))
    finish_shares(a.excite, patch_of(a.g, at), scratch, [&](int s, int r, float sum) {
      const int64_t n = at.n0 + s;
      a.dpreact[n * a.g.r + r] = through_act(a.excite.act, sum, a.excite.preact[n * a.excite.preact_stride + r]);
    });
}

template <class T>
__global__ void __launch_bounds__(kThreads, 3) squeeze_backward_channels_last_kernel(const SqueezeBackwardArguments a) {
  SENET_SHARED(float, scratch, kScratch);
  SENET_SHARED(float, dgate, kMaxColumns);
  release_dependents();
  const TileAt at(a.g, blockIdx.x);
  const Column mine(a.g, at);
  float total[kPack] = {};
  if (mine.active) {
    const int64_t c = a.g.c, n = at.n0 + mine.sample, line = (c + kPack - 1) / kPack;
    const T* x = static_cast<const T*>(a.x) + n * a.x_stride + mine.c;
    const T* dy = static_cast<const T*>(a.dy) + n * a.dy_stride + mine.c;
    const uint8_t* mask = a.mask != nullptr ? a.mask + n * a.g.m * line + mine.c / kPack : nullptr;
    const auto keep = [&](int p) { return mask != nullptr ? uint32_t{mask[p * line]} : 255u; };
    const auto use = [&](int, const Pair8<T>& v) { add_products(v, total); };
    if (a.g.wide && mine.count == kPack)
      in_flight<kInFlight<T>>(
          at.p0 + mine.row, at.p1, mine.rows,
          [&](int p) { return Pair8<T>{load_pack<false>(x + p * c), load_pack<false>(dy + p * c), keep(p)}; }, use);
    else
      in_flight<1>(
          at.p0 + mine.row, at.p1, mine.rows,
          [&](int p) {
            return Pair8<T>{load_part(x + p * c, 0, mine.count, a.g.wide),
                            load_part(dy + p * c, 0, mine.count, a.g.wide), keep(p)};
          },
          use);
  }
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
    if (k < at.channels) {
      const int64_t flat = static_cast<int64_t>(at.c0 + k) * a.g.m + at.p0;
      const int begin = static_cast<int>(flat % kPack), line = (a.g.m + 7) / 8;
      const T* x = static_cast<const T*>(a.x) + at.n0 * a.x_stride + flat - begin;
      const T* dy = static_cast<const T*>(a.dy) + at.n0 * a.dy_stride + flat - begin;
      const uint8_t* mask = a.mask != nullptr ? a.mask + (at.n0 * a.g.c + at.c0 + k) * line : nullptr;
      const auto keep = [&](int i, int lo, int hi) {
        return mask != nullptr ? bits_at(mask, at.p0 + i * kPack + lo - begin, hi - lo) << lo : 255u;
      };
      over_packs<kInFlight<T>>(
          begin, begin + at.p1 - at.p0, lane, a.g.lanes, a.g.wide,
          [&](int i) {
            return Pair8<T>{load_pack<false>(x + i * kPack), load_pack<false>(dy + i * kPack), keep(i, 0, kPack)};
          },
          [&](int i, int lo, int hi) {
            return Pair8<T>{load_part(x + i * kPack, lo, hi, a.g.wide), load_part(dy + i * kPack, lo, hi, a.g.wide),
                            keep(i, lo, hi)};
          },
          [&](int, int, int, const Pair8<T>& v) { add_products(v, total); });
    }
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
  const int m = a.g.m, line = (m + 7) / 8, lane = thread_index() % a.g.lanes, groups = kThreads / a.g.lanes;
  const int64_t first = static_cast<int64_t>(at.c0) * m;
  T* x = reinterpret_cast<T*>(memory);
  T* dy = x + (a.g.channels * m + kPack - 1) / kPack * kPack;
  stage(x, static_cast<const T*>(a.x) + at.n0 * a.x_stride + first, at.channels * m, a.g.wide);
  stage(dy, static_cast<const T*>(a.dy) + at.n0 * a.dy_stride + first, at.channels * m, a.g.wide);
  copy_wait();
  __syncthreads();
  for (int k0 = 0; k0 < at.channels; k0 += groups) {
    const int k = k0 + thread_index() / a.g.lanes;
    float sum = 0.0f;
    if (k < at.channels) {
      const uint8_t* mask = a.mask != nullptr ? a.mask + (at.n0 * a.g.c + at.c0 + k) * line : nullptr;
#pragma unroll 4
      for (int p = lane; p < m; p += a.g.lanes) {
        const bool keep = mask == nullptr || (mask[p / 8] >> p % 8 & 1) != 0;
        sum += to_float(x[k * m + p]) * (keep ? to_float(dy[k * m + p]) : 0.0f);
      }
    }
    sum = group_sum(sum, a.g.lanes, scratch);
    if (lane == 0 && k < at.channels) dgate[k] = sum;
  }
  __syncthreads();
  finish_squeeze_backward(a, at, dgate, flat_stride(a.g), scratch);
}

}  // namespace senet::cuda
