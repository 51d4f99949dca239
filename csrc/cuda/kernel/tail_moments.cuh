// The first sweep of a block tail's forward: what (T1) takes of every plane, or with given statistics the parts of the
// mean of x - mu.
#pragma once
#include "read_x.cuh"
#include "tail.cuh"

namespace senet::cuda {

struct TailMomentsArguments : SourceOfX {
  Vector given;  // the mean of each channel; or none, and the batch's is wanted
  float inv_m;
  float *shifts, *means, *squares;  // [n, splits, c]; with a given mean, means alone
};

__device__ __forceinline__ int64_t part_at(const TailMomentsArguments& a, const TileAt& at, int s, int c) {
  return ((at.n0 + s) * a.g.splits + at.split) * a.g.c + at.c0 + c;
}

// What a thread has seen of a column: sums of d = x - shift and of d^2. Its shift is an element of its own, so that
// the squares lose no more than as many bits as `count` has.
struct Moments {
  float shift, sum, squares;
  int count;

  __device__ __forceinline__ float inverse() const { return count > 0 ? 1.0f / static_cast<float>(count) : 0.0f; }
  // The sum of x - base.
  __device__ __forceinline__ float sum_from(float base) const {
    return static_cast<float>(count) * (shift - base) + sum;
  }
  // The squares of the deviations from mean + base.
  __device__ __forceinline__ float squares_from(float base, float mean) const {
    const float inv = inverse(), apart = ((shift - base) - mean) + sum * inv;
    return at_least_zero(squares - sum * (sum * inv)) + static_cast<float>(count) * (apart * apart);
  }
};

// From what the threads have seen of their columns to the tile's parts (Chan, Golub & LeVeque 1983): all means are
// taken from the first row's shift, `base`, and all squares from the tile's mean. base, mean: kMaxColumns floats.
__device__ __forceinline__ void finish_columns(const TailMomentsArguments& a, const TileAt& at, const Column& mine,
                                               const Moments (&seen)[kPack], float* base, float* mean, float* scratch) {
  const int stride = a.g.channels, own = mine.sample < a.g.samples ? mine.sample * stride + mine.column : 0;
  const auto is_there = [&](int s, int c) { return s < at.samples && c < at.channels; };
  float part[kPack];
  if (a.given.is_there()) {
#pragma unroll
    for (int j = 0; j < kPack; ++j) part[j] = seen[j].sum;
    over_rows(a.g, mine, part, scratch, Plus(), [&](int s, int c, float v) {
      if (is_there(s, c)) a.means[part_at(a, at, s, c)] = v * a.inv_m;
    });
    return;
  }
  if (mine.row == 0 && mine.sample < a.g.samples)
#pragma unroll
    for (int j = 0; j < kPack; ++j) base[own + j] = seen[j].shift;
  __syncthreads();
  const float inv_count = 1.0f / static_cast<float>(at.p1 - at.p0);
#pragma unroll
  for (int j = 0; j < kPack; ++j) part[j] = seen[j].sum_from(base[own + j]);
  over_rows(a.g, mine, part, scratch, Plus(), [&](int s, int c, float v) { mean[s * stride + c] = v * inv_count; });
#pragma unroll
  for (int j = 0; j < kPack; ++j) part[j] = seen[j].squares_from(base[own + j], mean[own + j]);
  over_rows(a.g, mine, part, scratch, Plus(), [&](int s, int c, float v) {
    if (!is_there(s, c)) return;
    a.shifts[part_at(a, at, s, c)] = base[s * stride + c];
    a.means[part_at(a, at, s, c)] = mean[s * stride + c];
    a.squares[part_at(a, at, s, c)] = v;
  });
}

template <class T>
__global__ void __launch_bounds__(kThreads, 3) tail_moments_channels_last_kernel(const TailMomentsArguments a) {
  SENET_SHARED(float, scratch, kScratch);
  SENET_SHARED(float, base, kMaxColumns);
  SENET_SHARED(float, mean, kMaxColumns);
  release_dependents();
  const TileAt at(a.g, blockIdx.x);
  const Column mine(a.g, at);
  const int first = at.p0 + mine.row;
  Moments seen[kPack] = {};
  if (mine.active && first < at.p1) {
    float v[kPack];
    const T* x = column_of<T>(a, at, mine) + first * static_cast<int64_t>(a.g.c);
    if (!a.given.is_there()) unpack(load_part(x, 0, mine.count, a.g.wide), v);
#pragma unroll
    for (int j = 0; j < kPack; ++j) {
      if (a.given.is_there())
        seen[j].shift = j < mine.count ? a.given[mine.c + j] : 0.0f;
      else
        seen[j].shift = finite_or_zero(v[j]);
      seen[j].count = (at.p1 - first + mine.rows - 1) / mine.rows;
    }
    over_column<T>(a, at, mine, [&](const Pack<T>& pack) {
      unpack(pack, v);
#pragma unroll
      for (int j = 0; j < kPack; ++j) {
        const float d = v[j] - seen[j].shift;
        seen[j].sum += d;
        seen[j].squares += d * d;
      }
    });
  }
  finish_columns(a, at, mine, seen, base, mean, scratch);
}

// As finish_columns, for plane k of the tile and the lanes that share it.
__device__ __forceinline__ void finish_plane(const TailMomentsArguments& a, const TileAt& at, const Moments& seen,
                                             int k, int lane, float* scratch) {
  const int lanes = a.g.lanes;
  const bool stores = lane == 0 && k < at.channels;
  if (a.given.is_there()) {
    const float sum = group_sum(seen.sum, lanes, scratch);
    if (stores) a.means[part_at(a, at, 0, k)] = sum * a.inv_m;
    return;
  }
  const float base = group_sum(lane == 0 ? seen.shift : 0.0f, lanes, scratch);
  const float mean = group_sum(seen.sum_from(base), lanes, scratch) * (1.0f / static_cast<float>(at.p1 - at.p0));
  const float squares = group_sum(seen.squares_from(base, mean), lanes, scratch);
  if (!stores) return;
  a.shifts[part_at(a, at, 0, k)] = base;
  a.means[part_at(a, at, 0, k)] = mean;
  a.squares[part_at(a, at, 0, k)] = squares;
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) tail_moments_planes_kernel(const TailMomentsArguments a) {
  SENET_SHARED(float, scratch, kThreads / 32);
  release_dependents();
  const TileAt at(a.g, blockIdx.x);
  const int lane = thread_index() % a.g.lanes, groups = kThreads / a.g.lanes;
  for (int k0 = 0; k0 < at.channels; k0 += groups) {
    const int k = k0 + thread_index() / a.g.lanes;
    Moments seen{};
    if (k < at.channels) {
      const PlaneOfX<T> plane(a, at, k);
      const int own = max((plane.begin / kPack + lane) * kPack, plane.begin);
      seen.shift = a.given.is_there() ? a.given[at.c0 + k] : finite_or_zero(to_float(plane.x[min(own, plane.end - 1)]));
      float sum[kPack] = {}, squares[kPack] = {};
      over_plane<T, kInFlight<T>>(a, at, k, lane, [&](int lo, int hi, const Pack<T>& pack) {
        float v[kPack];
        unpack(pack, v);
#pragma unroll
        for (int j = 0; j < kPack; ++j) {
          const float d = j >= lo && j < hi ? v[j] - seen.shift : 0.0f;
          sum[j] += d;
          squares[j] += d * d;
        }
        seen.count += hi - lo;
      });
      seen.sum = sum_of(sum);
      seen.squares = sum_of(squares);
    }
    finish_plane(a, at, seen, k, lane, scratch);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 3) tail_moments_tile_of_planes_kernel(const TailMomentsArguments a) {
  SENET_DYNAMIC_SHARED(memory);
  T* tile = reinterpret_cast<T*>(memory);
  release_dependents();
  const TileAt at(a.g, blockIdx.x);
  const int m = a.g.m, lane = thread_index() % a.g.lanes, groups = kThreads / a.g.lanes;
  stage_planes(tile, a, at);
  for (int k0 = 0; k0 < at.channels; k0 += groups) {
    const int k = k0 + thread_index() / a.g.lanes;
    Moments seen{};
    if (k < at.channels) {
      const T* plane = tile + k * m;
      seen.shift = a.given.is_there() ? a.given[at.c0 + k] : finite_or_zero(to_float(plane[min(lane, m - 1)]));
      seen.count = lane < m ? (m - lane + a.g.lanes - 1) / a.g.lanes : 0;
#pragma unroll 4
      for (int p = lane; p < m; p += a.g.lanes) {
        const float d = to_float(plane[p]) - seen.shift;
        seen.sum += d;
        seen.squares += d * d;
      }
    }
    finish_plane(a, at, seen, k, lane, nullptr);  // at most 32 lanes
  }
}

}  // namespace senet::cuda
