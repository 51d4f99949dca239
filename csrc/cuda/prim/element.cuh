// The element types of tensors, and float32, in which everything is computed.
#pragma once
#include <cstdint>

#include "port.cuh"

namespace senet::cuda {

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ void from_float(float v, float& out) { out = v; }
__device__ __forceinline__ void from_float(float v, __half& out) { out = __float2half_rn(v); }
__device__ __forceinline__ void from_float(float v, __nv_bfloat16& out) { out = __float2bfloat16_rn(v); }

// Words of 32 bits: one float32, or two 16-bit elements. The last argument only names the type.
union Pair {
  uint32_t word;
  float single;
  __half2_raw half;
  __nv_bfloat162_raw brain;
};
__device__ __forceinline__ void widen(uint32_t word, float* v, float) {
  Pair p;
  p.word = word;
  v[0] = p.single;
}
__device__ __forceinline__ void widen(uint32_t word, float* v, __half) {
  Pair p;
  p.word = word;
  const float2 f = __half22float2(__half2(p.half));
  v[0] = f.x, v[1] = f.y;
}
__device__ __forceinline__ void widen(uint32_t word, float* v, __nv_bfloat16) {
  Pair low, high;
  low.word = word << 16, high.word = word & 0xffff0000u;
  v[0] = low.single, v[1] = high.single;
}
__device__ __forceinline__ uint32_t narrow(const float* v, float) {
  Pair p;
  p.single = v[0];
  return p.word;
}
__device__ __forceinline__ uint32_t narrow(const float* v, __half) {
  Pair p;
  p.half = __floats2half2_rn(v[0], v[1]);
  return p.word;
}
__device__ __forceinline__ uint32_t narrow(const float* v, __nv_bfloat16) {
  Pair p;
  p.brain = __floats2bfloat162_rn(v[0], v[1]);
  return p.word;
}

}  // namespace senet::cuda
