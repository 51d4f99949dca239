// Weights in their own dtype: which one is known at run time only.
#pragma once
#include <cstdint>

#include "element.cuh"

namespace senet::cuda {

enum class Type : int { float32, bfloat16, float16 };

// A matrix of weights. wide: its rows begin at multiples of 4 elements, and the first at 16 bytes.
struct Matrix {
  const void* data;
  Type type;
  bool wide;
};

__device__ __forceinline__ float weight_at(const Matrix& w, int64_t at) {
  if (w.type == Type::float32) return __ldg(static_cast<const float*>(w.data) + at);
  if (w.type == Type::bfloat16) return to_float(static_cast<const __nv_bfloat16*>(w.data)[at]);
  return to_float(static_cast<const __half*>(w.data)[at]);
}

// The first `count` of four weights from `at` on, the others zero.
__device__ __forceinline__ float4 weights_at(const Matrix& w, int64_t at, int count) {
  if (w.wide && count >= 4 && at % 4 == 0) {
    if (w.type == Type::float32) return __ldg(reinterpret_cast<const float4*>(static_cast<const float*>(w.data) + at));
    const uint2 raw = __ldg(reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(w.data) + at));
    float v[4];
    if (w.type == Type::bfloat16) {
      widen(raw.x, v, __nv_bfloat16());
      widen(raw.y, v + 2, __nv_bfloat16());
    } else {
      widen(raw.x, v, __half());
      widen(raw.y, v + 2, __half());
    }
    return make_float4(v[0], v[1], v[2], v[3]);
  }
  return make_float4(count > 0 ? weight_at(w, at) : 0.0f, count > 1 ? weight_at(w, at + 1) : 0.0f,
                     count > 2 ? weight_at(w, at + 2) : 0.0f, count > 3 ? weight_at(w, at + 3) : 0.0f);
}

// As weights_at, of float32 vectors. wide: `at` is a multiple of 16 bytes, and all four are there. Past the L1: other
// blocks of the same launch may have written them.
__device__ __forceinline__ float4 floats_at(const float* at, int count, bool wide) {
  if (wide) return __ldcg(reinterpret_cast<const float4*>(at));
  return make_float4(count > 0 ? __ldcg(at) : 0.0f, count > 1 ? __ldcg(at + 1) : 0.0f,
                     count > 2 ? __ldcg(at + 2) : 0.0f, count > 3 ? __ldcg(at + 3) : 0.0f);
}

__device__ __forceinline__ void store_weight(void* data, Type type, int64_t at, float v) {
  if (type == Type::float32)
    static_cast<float*>(data)[at] = v;
  else if (type == Type::bfloat16)
    from_float(v, static_cast<__nv_bfloat16*>(data)[at]);
  else
    from_float(v, static_cast<__half*>(data)[at]);
}

}  // namespace senet::cuda
