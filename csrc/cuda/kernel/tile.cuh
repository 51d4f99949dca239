// Which part of the tensor a block of threads works on, and which part of that a thread.
#pragma once
#include <cstdint>

#include "../../plan/cuda_plan.h"
#include "../prim/pack.cuh"
#include "../prim/reduce.cuh"

namespace senet::cuda {

// What the planner promises of a tile.
constexpr int kMaxColumns = static_cast<int>(kMaxTileColumns), kMostSamples = static_cast<int>(kMaxSamples);
constexpr int kFlatChannels = static_cast<int>(kMaxFlatChannels), kFlatElements = static_cast<int>(kMaxFlatElements);
static_assert(kThreads == kCudaThreads && kPack == kCudaPack, "the planner's tiles are made for these kernels");

// The layer's sizes and the plan's tile. wide: every tensor lies so that packs can be read 16 bytes at a time.
struct Geometry {
  int64_t n;
  int c, r, m;
  int samples, channels, positions, splits, blocks, lanes;
  bool wide;
};

// Tiles that follow each other are neighbours in memory: channels first, then positions, then samples.
struct TileAt {
  int64_t n0;
  int group, samples;  // how many of the tile's samples there are
  int c0, channels;    // and of its channels
  int split, p0, p1;
  int t, tiles;  // which one of so many of its samples

  __device__ __forceinline__ TileAt(const Geometry& g, unsigned index) {
    tiles = g.blocks * g.splits;
    group = index / tiles;
    t = index % tiles;
    n0 = static_cast<int64_t>(group) * g.samples;
    samples = static_cast<int>(min(static_cast<int64_t>(g.samples), g.n - n0));
    c0 = t % g.blocks * g.channels;
    channels = min(g.channels, g.c - c0);
    split = t / g.blocks;
    p0 = split * g.positions;
    p1 = static_cast<int>(min(static_cast<int64_t>(p0) + g.positions, static_cast<int64_t>(g.m)));
  }
};

// channels_last: a thread has one pack of channels of one sample, and every rows-th position.
struct Column {
  int row, rows, sample, column, c, count;
  bool active;

  __device__ __forceinline__ Column(const Geometry& g, const TileAt& at) {
    const int lanes = g.channels / kPack, q = thread_index() / lanes;
    rows = kThreads / lanes / g.samples;
    column = thread_index() % lanes * kPack;
    sample = q / rows;
    row = q % rows;
    c = at.c0 + column;
    count = min(kPack, g.c - c);
    active = sample < at.samples && count > 0;
  }
};

// What the threads of a channels_last tile have for its columns, combined over the rows, in a fixed order:
// out(sample, channel, total). scratch: kScratch floats. Ends behind a barrier.
template <class Combine, class Out>
__device__ __forceinline__ void over_rows(const Geometry& g, const Column& mine, const float (&v)[kPack],
                                          float* scratch, Combine combine, Out out) {
  if (mine.sample < g.samples) {
    float4* to = reinterpret_cast<float4*>(scratch + (mine.sample * mine.rows + mine.row) * g.channels + mine.column);
    to[0] = make_float4(v[0], v[1], v[2], v[3]);
    to[1] = make_float4(v[4], v[5], v[6], v[7]);
  }
  __syncthreads();
  for (int i = thread_index(); i < g.samples * g.channels; i += kThreads) {
    const int s = i / g.channels, c = i % g.channels;
    const float* from = scratch + s * mine.rows * g.channels + c;
    const auto at = [&](int row) { return from[row * g.channels]; };
    float total = from[0];
    int row = 1;
    // Four at a time among themselves first: up to 128 rows, one after the other, would round as often.
    for (; row + 3 < mine.rows; row += 4)
      total = combine(total, combine(combine(at(row), at(row + 1)), combine(at(row + 2), at(row + 3))));
    for (; row < mine.rows; ++row) total = combine(total, at(row));
    out(s, c, total);
  }
  __syncthreads();
}

// [channels] of a contiguous tile in shared memory, for products that take four at a time.
__device__ __forceinline__ int flat_stride(const Geometry& g) { return (g.channels + 3) / 4 * 4; }

// Copies `count` elements from global to shared memory; there behind copy_wait and a barrier.
template <class T>
__device__ __forceinline__ void stage(T* to, const T* from, int count, bool wide) {
  constexpr int kPer = 16 / sizeof(T);
  const int whole = wide ? count / kPer : 0;
  for (int i = thread_index(); i < whole; i += kThreads) copy_async(to + i * kPer, from + i * kPer);
  for (int i = whole * kPer + thread_index(); i < count; i += kThreads) to[i] = from[i];
}

struct Plus {
  __device__ __forceinline__ float operator()(float a, float b) const { return a + b; }
};
struct Larger {
  __device__ __forceinline__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

__device__ __forceinline__ float sum_of(const float (&v)[kPack]) {
  return ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]));
}

}  // namespace senet::cuda
