// Sums over the threads of a block. The order depends on the sizes alone.
#pragma once
#include <cstdint>

#include "port.cuh"

namespace senet::cuda {

constexpr int kThreads = 256;  // of every block
constexpr int kScratch = kThreads * 8;
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ __forceinline__ int thread_index() { return static_cast<int>(threadIdx.x); }

__device__ __forceinline__ int power_at_least(int n) {
  int p = 1;
  while (p < n) p *= 2;
  return p;
}

// Sums over groups of `lanes` neighbouring threads, a power of two; every thread of the block calls it, and gets its
// group's sum. scratch: a float per warp, needed beyond 32 lanes.
__device__ __forceinline__ float group_sum(float v, int lanes, float* scratch) {
  for (int o = min(lanes, 32) / 2; o > 0; o /= 2) v += __shfl_xor_sync(kAllLanes, v, o);
  if (lanes > 32) {
    __syncthreads();
    if (thread_index() % 32 == 0) scratch[thread_index() / 32] = v;
    __syncthreads();
    const int warps = lanes / 32, first = thread_index() / lanes * warps;
    v = 0.0f;
    for (int w = 0; w < warps; ++w) v += scratch[first + w];
  }
  return v;
}

__device__ __forceinline__ float group_max(float v, int lanes, float* scratch) {
  for (int o = min(lanes, 32) / 2; o > 0; o /= 2) v = fmaxf(v, __shfl_xor_sync(kAllLanes, v, o));
  if (lanes > 32) {
    __syncthreads();
    if (thread_index() % 32 == 0) scratch[thread_index() / 32] = v;
    __syncthreads();
    const int warps = lanes / 32, first = thread_index() / lanes * warps;
    for (int w = 0; w < warps; ++w) v = fmaxf(v, scratch[first + w]);
  }
  return v;
}

__device__ __forceinline__ void add(float4& sum, const float4& v) {
  sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
}

// out(i, sum over rows of at(row, i)) for i below `items`, four sums at a time. Rows are shared by threads where there
// are more threads than items, and six are under way per thread (the last one again in place of any behind it).
// scratch: 4 * kThreads floats. Ends behind a
// barrier.
template <class At, class Out>
__device__ __forceinline__ void sum_rows(int rows, int items, float* scratch, At at, Out out) {
  const int width = min(kThreads, power_at_least(items)), parts = kThreads / width;
  const int part = thread_index() / width;
  float4* sums = reinterpret_cast<float4*>(scratch);
  for (int first = 0; first < items; first += width) {
    const int i = first + thread_index() % width;
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (i < items) {
      // Loaded before the first is added, or each would wait for the one in front of it.
      constexpr int kAtOnce = 6;
      for (int row = part; row < rows; row += kAtOnce * parts) {
        float4 v[kAtOnce];
#pragma unroll
        for (int u = 0; u < kAtOnce; ++u) v[u] = at(min(row + u * parts, rows - 1), i);
#pragma unroll
        for (int u = 0; u < kAtOnce; ++u)
          if (row + u * parts < rows) add(sum, v[u]);
      }
    }
    if (parts > 1) {
      __syncthreads();
      sums[thread_index()] = sum;
      __syncthreads();
      for (int p = 1; p < min(parts, rows); ++p)
        if (part == 0) add(sum, sums[p * width + thread_index()]);
    }
    if (part == 0 && i < items) out(i, sum);
  }
  __syncthreads();
}

// True in every thread of the last of `count` blocks to come here with this counter; what the others wrote before is
// then visible, to loads that go past the L1. The counter is at zero before the first and after the last.
__device__ __forceinline__ bool is_last_block(int* counter, int count) {
  SENET_SHARED(int, last, 1);
  __syncthreads();
  if (thread_index() == 0) {
    __threadfence();
    *last = atomicAdd(counter, 1) == count - 1;
    if (*last) {
      *counter = 0;
      __threadfence();
    }
  }
  __syncthreads();
  return *last != 0;
}

}  // namespace senet::cuda
