// First sweeps of the forward: how a tile's threads read x.
#pragma once
#include "../prim/walk.cuh"
#include "tile.cuh"

namespace senet::cuda {

struct SourceOfX {
  Geometry g;
  const void* x;
  int64_t x_stride;  // from sample to sample, in elements
};

// Where the thread's column of x begins, which is active.
template <class T>
__device__ __forceinline__ const T* column_of(const SourceOfX& a, const TileAt& at, const Column& mine) {
  return static_cast<const T*>(a.x) + (at.n0 + mine.sample) * a.x_stride + mine.c;
}

// use(pack) for the thread's positions of its column; zeros beyond the last channel.
template <class T, class Use>
__device__ __forceinline__ void over_column(const SourceOfX& a, const TileAt& at, const Column& mine, Use use) {
  const T* x = column_of<T>(a, at, mine);
  const int64_t c = a.g.c;
  const auto take = [&](int, const Pack<T>& v) { use(v); };
  if (a.g.wide && mine.count == kPack)
    in_flight<kInFlight<T>>(
        at.p0 + mine.row, at.p1, mine.rows, [&](int p) { return load_pack<false>(x + p * c); }, take);
  else
    in_flight<1>(
        at.p0 + mine.row, at.p1, mine.rows, [&](int p) { return load_part(x + p * c, 0, mine.count, a.g.wide); }, take);
}

// The tile's part of its plane k: elements [begin, end) from `x` on, which is at a multiple of a pack.
template <class T>
struct PlaneOfX {
  const T* x;
  int begin, end;

  __device__ __forceinline__ PlaneOfX(const SourceOfX& a, const TileAt& at, int k) {
    const int64_t flat = static_cast<int64_t>(at.c0 + k) * a.g.m + at.p0;
    begin = static_cast<int>(flat % kPack);
    end = begin + at.p1 - at.p0;
    x = static_cast<const T*>(a.x) + at.n0 * a.x_stride + flat - begin;
  }
};

// use(lo, hi, pack) for the lane's packs of plane k, of which [lo, hi) are the plane's.
template <class T, int kAtOnce, class Use>
__device__ __forceinline__ void over_plane(const SourceOfX& a, const TileAt& at, int k, int lane, Use use) {
  const PlaneOfX<T> plane(a, at, k);
  over_packs<kAtOnce>(
      plane.begin, plane.end, lane, a.g.lanes, a.g.wide, [&](int i) { return load_pack<false>(plane.x + i * kPack); },
      [&](int i, int lo, int hi) { return load_part(plane.x + i * kPack, lo, hi, a.g.wide); },
      [&](int, int lo, int hi, const Pack<T>& v) { use(lo, hi, v); });
}

// All of a tile of planes in shared memory. Ends behind a barrier.
template <class T>
__device__ __forceinline__ void stage_planes(T* tile, const SourceOfX& a, const TileAt& at) {
  const T* x = static_cast<const T*>(a.x) + at.n0 * a.x_stride + static_cast<int64_t>(at.c0) * a.g.m;
  stage(tile, x, at.channels * a.g.m, a.g.wide);
  copy_wait();
  __syncthreads();
}

}  // namespace senet::cuda
