// CUDA C++ for a host compiler, as far as this project's kernels use it. Included before everything else:
//
//   g++ -x c++ -include tests/cuda_host/shim.h -DSENET_ON_HOST=1 -isystem <CUDA's headers> kernel.cu
//
// Finds races, by running threads in random orders, and misuse of barriers, shuffles, shared memory, asynchronous
// copies and dependent launches. Finds no missing memory fence, and tells nothing about speed: a GPU has the last word.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>

#include "grid.h"

#undef __global__
#undef __device__
#undef __host__
#undef __constant__
#undef __launch_bounds__
#undef __grid_constant__
#undef __noinline__
#define __global__
#define __device__
#define __host__
#define __constant__
#define __launch_bounds__(...)
#define __grid_constant__
#define __noinline__

// The lambda's static is one per place in the source and per instantiation of a template, as a __shared__ array is.
// 16 is what the device's version of this aligns to.
#define SENET_SHARED(type, name, count)                                                                            \
  type(&name)[count] = *reinterpret_cast<std::remove_reference_t<decltype(name)>*>(senet::cuda::host::grid.shared( \
      [] {                                                                                                         \
        static char identity;                                                                                      \
        return &identity;                                                                                          \
      }(),                                                                                                         \
      #name, sizeof(type[count]), std::max<size_t>(16, alignof(type))))
#define SENET_DYNAMIC_SHARED(name) \
  unsigned char* const name = senet::cuda::host::grid.shared(&senet::cuda::host::grid, "dynamic shared memory", 0, 16)

constexpr int warpSize = senet::cuda::host::kWarp;

// The last parameter of whatever may have something to complain of: where it is called.
#define SENET_SITE senet::cuda::host::Site site = senet::cuda::host::Site::here()

#pragma GCC visibility push(hidden)
namespace senet::cuda {

inline void copy_async(void* shared, const void* global, SENET_SITE) { host::grid.begin_copy(shared, global, site); }
inline void copy_wait() { host::grid.finish_copies(); }
inline void release_dependents() {}
inline void wait_for_previous() { host::grid.wait_for_previous(); }

template <class A>
std::string launch(const char* name, void (*kernel)(A), const A& arguments, int64_t blocks, int threads,
                   size_t shared_bytes, bool dependent, void* /*stream*/, int /*device*/) {
  static_assert(std::is_trivially_copyable_v<A> && sizeof(A) <= 4096, "a GPU couldn't take these arguments");
  return host::grid.run(name, [&] { kernel(arguments); }, blocks, threads, shared_bytes, dependent);
}

namespace host {

// Shuffles take the types that CUDA's do; beyond its segment of `width` lanes, a lane gets its own value.
template <class T>
T shuffle(const char* kind, unsigned mask, T value, int source, Site site) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, static_cast<const void*>(&value), sizeof value);
  bits = grid.exchange(kind, mask, bits, source, site);
  std::memcpy(static_cast<void*>(&value), &bits, sizeof value);
  return value;
}
inline int segment(int width) { return grid.lane() & ~(width - 1); }

template <class T>
T load(const char* kind, const T* address, Site site) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 16);
  grid.check_aligned(address, sizeof(T), kind, site);
  T value;
  std::memcpy(static_cast<void*>(&value), static_cast<const void*>(address), sizeof value);
  return value;
}
template <class T>
void store(const char* kind, T* address, const T& value, Site site) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 16);
  grid.check_aligned(address, sizeof(T), kind, site);
  std::memcpy(static_cast<void*>(address), static_cast<const void*>(&value), sizeof value);
}

template <class To, class From>
To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

}  // namespace host
}  // namespace senet::cuda

// ---------------------------------------------------------------------- threads of a block

inline void __syncthreads(SENET_SITE) { senet::cuda::host::grid.barrier("__syncthreads", 0, site); }
inline int __syncthreads_count(int predicate, SENET_SITE) {
  return senet::cuda::host::grid.barrier("__syncthreads_count", predicate != 0, site);
}
inline int __syncthreads_or(int predicate, SENET_SITE) {
  return senet::cuda::host::grid.barrier("__syncthreads_or", predicate != 0, site) != 0;
}
inline int __syncthreads_and(int predicate, SENET_SITE) {
  return senet::cuda::host::grid.barrier("__syncthreads_and", predicate == 0, site) == 0;
}

inline void __syncwarp(unsigned mask = ~0u, SENET_SITE) {
  senet::cuda::host::grid.exchange("__syncwarp", mask, 0, -1, site);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, SENET_SITE) {
  return static_cast<unsigned>(senet::cuda::host::grid.exchange("__ballot_sync", mask, predicate != 0, -1, site));
}
inline int __any_sync(unsigned mask, int predicate, SENET_SITE) {
  return senet::cuda::host::grid.exchange("__any_sync", mask, predicate != 0, -1, site) != 0;
}
inline int __all_sync(unsigned mask, int predicate, SENET_SITE) {
  return senet::cuda::host::grid.exchange("__all_sync", mask, predicate == 0, -1, site) == 0;
}
template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = warpSize, SENET_SITE) {
  const int source = senet::cuda::host::segment(width) + (lane & (width - 1));
  return senet::cuda::host::shuffle("__shfl_sync", mask, value, source, site);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = warpSize, SENET_SITE) {
  const int me = senet::cuda::host::grid.lane(), source = me ^ bits;
  const bool within = source < senet::cuda::host::segment(width) + width;
  return senet::cuda::host::shuffle("__shfl_xor_sync", mask, value, within ? source : me, site);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize, SENET_SITE) {
  const int me = senet::cuda::host::grid.lane(), source = me + static_cast<int>(delta);
  const bool within = source < senet::cuda::host::segment(width) + width;
  return senet::cuda::host::shuffle("__shfl_down_sync", mask, value, within ? source : me, site);
}

// ---------------------------------------------------------------------- memory

// Threads give way at synchronisation alone, so every access is atomic and in order.
inline void __threadfence() {}
inline void __threadfence_block() {}
inline int atomicAdd(int* address, int value) {
  const int old = *address;
  *address = static_cast<int>(static_cast<unsigned>(old) + static_cast<unsigned>(value));
  return old;
}
inline unsigned atomicAdd(unsigned* address, unsigned value) {
  const unsigned old = *address;
  *address = old + value;
  return old;
}

#define SENET_LOAD(name)                                        \
  template <class T>                                            \
  T name(const T* address, SENET_SITE) {                        \
    return senet::cuda::host::load(#name " of", address, site); \
  }
#define SENET_STORE(name)                                        \
  template <class T>                                             \
  void name(T* address, T value, SENET_SITE) {                   \
    senet::cuda::host::store(#name " to", address, value, site); \
  }
SENET_LOAD(__ldg)
SENET_LOAD(__ldcg)
SENET_LOAD(__ldcs)
SENET_STORE(__stcg)
SENET_STORE(__stcs)
#undef SENET_LOAD
#undef SENET_STORE

// ---------------------------------------------------------------------- arithmetic

using std::max;
using std::min;

inline int __float_as_int(float v) { return senet::cuda::host::bits_as<int>(v); }
inline unsigned __float_as_uint(float v) { return senet::cuda::host::bits_as<unsigned>(v); }
inline float __int_as_float(int v) { return senet::cuda::host::bits_as<float>(v); }
inline float __uint_as_float(unsigned v) { return senet::cuda::host::bits_as<float>(v); }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(uint64_t{a} * b >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __frcp_rn(float v) { return 1.0f / v; }
inline float __frsqrt_rn(float v) { return static_cast<float>(1.0 / std::sqrt(static_cast<double>(v))); }
inline float __fdividef(float a, float b) { return a / b; }
// Functions of these names are in some C libraries.
#define __expf(v) expf(v)
#define rsqrtf(v) __frsqrt_rn(v)

#undef SENET_SITE
#pragma GCC visibility pop

// ---------------------------------------------------------------------- for whoever loads the library

extern "C" {
// From here on, the same launches run in the same order again.
[[gnu::used, gnu::visibility("default")]] inline void senet_host_seed(unsigned seed) {
  senet::cuda::host::grid.seed(seed);
}
[[gnu::used, gnu::visibility("default")]] inline int senet_host_launches(const char* name) {
  const auto& launches = senet::cuda::host::grid.launches;
  const auto found = launches.find(name);
  return found == launches.end() ? 0 : found->second;
}
// A line "name count" for each kernel, by name; valid until the next call.
[[gnu::used, gnu::visibility("default")]] inline const char* senet_host_all_launches() {
  static std::string text;
  text.clear();
  for (const auto& [name, count] : senet::cuda::host::grid.launches) text += name + " " + std::to_string(count) + "\n";
  return text.c_str();
}
[[gnu::used, gnu::visibility("default")]] inline void senet_host_forget_launches() {
  senet::cuda::host::grid.launches.clear();
}
}
