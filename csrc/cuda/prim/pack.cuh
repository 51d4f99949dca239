// Eight elements of a tensor: read and written 16 bytes at a time where they are aligned, computed with as float32.
#pragma once
#include <cstdint>

#include "element.cuh"

namespace senet::cuda {

constexpr int kPack = 8;

// Loads under way per thread: 64 bytes.
template <class T>
constexpr int kInFlight = 8 / sizeof(T);

// Elements as they lie in memory: one word of 32 bits holds one float32 or two 16-bit elements.
template <class T>
struct Pack {
  static constexpr int kVectors = sizeof(T) / 2, kWords = 4 * kVectors, kPerVector = kPack / kVectors;
  uint4 raw[kVectors];
};

template <class T>
__device__ __forceinline__ void unpack(const Pack<T>& p, float (&v)[kPack]) {
  constexpr int kEach = 4 / sizeof(T);
#pragma unroll
  for (int i = 0; i < Pack<T>::kVectors; ++i) {
    const uint32_t words[4] = {p.raw[i].x, p.raw[i].y, p.raw[i].z, p.raw[i].w};
#pragma unroll
    for (int j = 0; j < 4; ++j) widen(words[j], v + (4 * i + j) * kEach, T());
  }
}

template <class T>
__device__ __forceinline__ Pack<T> pack(const float (&v)[kPack]) {
  constexpr int kEach = 4 / sizeof(T);
  Pack<T> p;
#pragma unroll
  for (int i = 0; i < Pack<T>::kVectors; ++i) {
    uint32_t words[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) words[j] = narrow(v + (4 * i + j) * kEach, T());
    p.raw[i] = make_uint4(words[0], words[1], words[2], words[3]);
  }
  return p;
}

// All eight, aligned. kStream: what is read or written is not wanted again soon.
template <bool kStream, class T>
__device__ __forceinline__ Pack<T> load_pack(const T* at) {
  Pack<T> p;
#pragma unroll
  for (int i = 0; i < Pack<T>::kVectors; ++i) {
    const uint4* from = reinterpret_cast<const uint4*>(at) + i;
    p.raw[i] = kStream ? __ldcs(from) : __ldg(from);
  }
  return p;
}

template <class T>
__device__ __forceinline__ void store_pack(T* at, const Pack<T>& p, bool stream) {
#pragma unroll
  for (int i = 0; i < Pack<T>::kVectors; ++i) {
    uint4* to = reinterpret_cast<uint4*>(at) + i;
    if (stream)
      __stcs(to, p.raw[i]);
    else
      *to = p.raw[i];
  }
}

// Elements [lo, hi) of the eight, the others are zero. wide: 16 bytes at a time where all of them are wanted.
template <class T>
__device__ __forceinline__ Pack<T> load_part(const T* at, int lo, int hi, bool wide) {
  constexpr int kPer = Pack<T>::kPerVector;
  float v[kPack];
#pragma unroll
  for (int j = 0; j < kPack; ++j) v[j] = 0.0f;
  Pack<T> p;
#pragma unroll
  for (int i = 0; i < Pack<T>::kVectors; ++i) {
    const bool all = wide && lo <= i * kPer && hi >= (i + 1) * kPer;
    if (all) p.raw[i] = __ldg(reinterpret_cast<const uint4*>(at) + i);
#pragma unroll
    for (int j = i * kPer; j < (i + 1) * kPer; ++j)
      if (!all && j >= lo && j < hi) v[j] = to_float(at[j]);
    if (!all) p.raw[i] = pack<T>(v).raw[i];
  }
  return p;
}

template <class T>
__device__ __forceinline__ void store_part(T* at, const float (&v)[kPack], int lo, int hi) {
#pragma unroll
  for (int j = 0; j < kPack; ++j)
    if (j >= lo && j < hi) from_float(v[j], at[j]);
}

}  // namespace senet::cuda
