// First sweeps of the backward: how a tile's threads read x and dy.
#pragma once
#include "../prim/bits.cuh"
#include "../prim/walk.cuh"
#include "tile.cuh"

namespace senet::cuda {

struct SourceOfPairs {
  Geometry g;
  const void *x, *dy;
  int64_t x_stride, dy_stride;
  const uint8_t* mask;  // of the ReLU, or null
};

// x and dy of the same eight elements, and which of them the ReLU let through.
template <class T>
struct Pair8 {
  Pack<T> x, dy;
  uint32_t keep;
};

// use(pair) for the thread's positions of its column, which is active; zeros beyond the last channel.
template <class T, class Use>
__device__ __forceinline__ void over_column_pairs(const SourceOfPairs& a, const TileAt& at, const Column& mine,
                                                  Use use) {
  const int64_t c = a.g.c, n = at.n0 + mine.sample, line = (c + kPack - 1) / kPack;
  const T* x = static_cast<const T*>(a.x) + n * a.x_stride + mine.c;
  const T* dy = static_cast<const T*>(a.dy) + n * a.dy_stride + mine.c;
  const uint8_t* mask = a.mask != nullptr ? a.mask + n * a.g.m * line + mine.c / kPack : nullptr;
  const auto keep = [&](int p) { return mask != nullptr ? uint32_t{mask[p * line]} : 255u; };
  const auto take = [&](int, const Pair8<T>& v) { use(v); };
  if (a.g.wide && mine.count == kPack)
    in_flight<kInFlight<T>>(
        at.p0 + mine.row, at.p1, mine.rows,
        [&](int p) { return Pair8<T>{load_pack<false>(x + p * c), load_pack<false>(dy + p * c), keep(p)}; }, take);
  else
    in_flight<1>(
        at.p0 + mine.row, at.p1, mine.rows,
        [&](int p) {
          return Pair8<T>{load_part(x + p * c, 0, mine.count, a.g.wide), load_part(dy + p * c, 0, mine.count, a.g.wide),
                          keep(p)};
        },
        take);
}

// use(lo, hi, pair) for the lane's packs of the tile's plane k, of which [lo, hi) are the plane's; zeros elsewhere.
template <class T, class Use>
__device__ __forceinline__ void over_plane_pairs(const SourceOfPairs& a, const TileAt& at, int k, int lane, Use use) {
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
      [&](int, int lo, int hi, const Pair8<T>& v) { use(lo, hi, v); });
}

// A tile of planes of both in shared memory, there for all threads.
template <class T>
struct StagedPairs {
  T *x, *dy;

  __device__ __forceinline__ StagedPairs(T* memory, const SourceOfPairs& a, const TileAt& at) {
    const int m = a.g.m;
    const int64_t first = static_cast<int64_t>(at.c0) * m;
    x = memory;
    dy = x + (a.g.channels * m + kPack - 1) / kPack * kPack;
    stage(x, static_cast<const T*>(a.x) + at.n0 * a.x_stride + first, at.channels * m, a.g.wide);
    stage(dy, static_cast<const T*>(a.dy) + at.n0 * a.dy_stride + first, at.channels * m, a.g.wide);
    copy_wait();
    __syncthreads();
  }

  // use(x, dy or 0 where the ReLU let nothing through) for the lane's positions of plane k.
  template <class Use>
  __device__ __forceinline__ void over_plane(const SourceOfPairs& a, const TileAt& at, int k, int lane, Use use) const {
    const int m = a.g.m;
    const uint8_t* mask = a.mask != nullptr ? a.mask + (at.n0 * a.g.c + at.c0 + k) * ((m + 7) / 8) : nullptr;
#pragma unroll 4
    for (int p = lane; p < m; p += a.g.lanes) {
      const bool keep = mask == nullptr || (mask[p / 8] >> p % 8 & 1) != 0;
      use(to_float(x[k * m + p]), keep ? to_float(dy[k * m + p]) : 0.0f);
    }
  }
};

}  // namespace senet::cuda
