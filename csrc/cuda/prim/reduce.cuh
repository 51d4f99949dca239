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

// out(column, sum over rows of at(row, column)) for columns below `columns`, which is at most kThreads. Rows are shared
// by threads where there are more threads than columns. scratch: kThreads floats. Begins and ends behind a barrier.
template <class At, class Out>
__device__ __forceinline__ void column_sums(int rows, int columns, float* scratch, At at, Out out) {
  const int width = power_at_least(columns), parts = kThreads / width;
  const int column = thread_index() % width, part = thread_index() / width;
  float sum = 0.0f;
  if (column < columns) {
#pragma unroll 8
    for (int row = part; row < rows; row += parts) sum += at(row, column);
  }
  __syncthreads();
  scratch[thread_index()] = sum;
  __syncthreads();
  if (part == 0 && column < columns) {
    sum = 0.0f;
    for (int p = 0; p < min(parts, rows); ++p) sum += scratch[p * width + column];
    out(column, sum);
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
    if (*last) *counter = 0;
    __threadfence();
  }
  __syncthreads();
  return *last != 0;
}

}  // namespace senet::cuda
