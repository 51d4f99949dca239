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

// A vector in its own dtype; data may be null.
struct Vector {
  const void* data;
  Type type;

  __device__ __forceinline__ bool is_there() const { return data != nullptr; }
  __device__ __forceinline__ float operator[](int64_t at) const {
    if (type == Type::float32) return static_cast<const float*>(data)[at];
    if (type == Type::bfloat16) return to_float(static_cast<const __nv_bfloat16*>(data)[at]);
    return to_float(static_cast<const __half*>(data)[at]);
  }
};

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

// Four weights of a row, all there and aligned: straight code, which a compiler can put in front of what uses them.
struct WideFloats {
  const float* data;
  __device__ __forceinline__ float4 operator()(int64_t at, int) const {
    return __ldg(reinterpret_cast<const float4*>(data + at));
  }
};
struct WideHalves {
  const uint16_t* data;
  bool brain;
  __device__ __forceinline__ float4 operator()(int64_t at, int) const {
    const uint2 raw = __ldg(reinterpret_cast<const uint2*>(data + at));
    float b[4], h[4];
    widen(raw.x, b, __nv_bfloat16()), widen(raw.y, b + 2, __nv_bfloat16());
    widen(raw.x, h, __half()), widen(raw.y, h + 2, __half());
    return make_float4(brain ? b[0] : h[0], brain ? b[1] : h[1], brain ? b[2] : h[2], brain ? b[3] : h[3]);
  }
};
// As many of four as there are.
struct AnyWeights {
  Matrix w;
  __device__ __forceinline__ float4 operator()(int64_t at, int count) const { return weights_at(w, at, count); }
};

// f(what loads the weights); aligned: all quads that it is asked for begin at multiples of 4 weights and are whole.
template <class F>
__device__ __forceinline__ void with_weights(const Matrix& w, bool aligned, F f) {
  if (!w.wide || !aligned)
    f(AnyWeights{w});
  else if (w.type == Type::float32)
    f(WideFloats{static_cast<const float*>(w.data)});
  else
    f(WideHalves{static_cast<const uint16_t*>(w.data), w.type == Type::bfloat16});
}

// Four floats of a vector, past the L1: other blocks of the same launch may have written them. Not wide: the first
// `count`, at least one, the last of them again in place of the others.
template <bool kWide>
__device__ __forceinline__ float4 floats_at(const float* at, int count) {
  if constexpr (kWide) return __ldcg(reinterpret_cast<const float4*>(at));
  return make_float4(__ldcg(at), __ldcg(at + min(1, count - 1)), __ldcg(at + min(2, count - 1)),
                     __ldcg(at + min(3, count - 1)));
}

__device__ __forceinline__ void store_weight(void* data, Type type, int64_t at, float v) {
  if (type == Type::float32)
    static_cast<float*>(data)[at] = v;
  else if (type == Type::bfloat16)
    from_float(v, static_cast<__nv_bfloat16*>(data)[at]);
  else
    from_float(v, static_cast<__half*>(data)[at]);
}

// As Vector, to be written.
struct Target {
  void* data;
  Type type;

  __device__ __forceinline__ bool is_there() const { return data != nullptr; }
  __device__ __forceinline__ void store(int64_t at, float v) const { store_weight(data, type, at, v); }
};

}  // namespace senet::cuda
