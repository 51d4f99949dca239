// What is not plain C++: shared memory, asynchronous copies, the order of dependent launches. Whoever runs the kernels
// on a host defines SENET_ON_HOST and brings all of this with him.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#ifndef SENET_ON_HOST

#define SENET_SHARED(type, name, count) __shared__ __align__(16) type name[count]
#define SENET_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]

namespace senet::cuda {

// 16 bytes from global to shared memory, both aligned; there once copy_wait has returned.
__device__ __forceinline__ void copy_async(void* shared, const void* global) {
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
}

// All copies of this thread have landed; other threads see them behind a barrier.
__device__ __forceinline__ void copy_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// The next launch may begin; it sees this one's results once its wait_for_previous has returned. Launches without the
// attribute for that, and processors before sm_90, know neither.
__device__ __forceinline__ void release_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace senet::cuda

#endif
