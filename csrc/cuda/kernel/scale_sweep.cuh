// Second sweeps of the forward over a tile: (E4) from the gates of its channels, or (T3) of a block tail.
#pragma once
#include "../prim/bits.cuh"
#include "../prim/divide.cuh"
#include "../prim/walk.cuh"
#include "tile.cuh"

namespace senet::cuda {

struct ScaleSweep {
  Geometry g;
  Divisor by_m;
  const void *x, *residual;  // residual or null
  int64_t x_stride, residual_stride;
  void* y;        // dense
  uint8_t* mask;  // where the ReLU lets through, or null
  bool relu, stream_stores;
};

template <class T>
struct Scaled8 {
  Pack<T> x, residual;
};

// What eight elements need to know of their channels: y = gate * x, of a tail y = gate * (x - mean) + shift.
template <bool kTail>
struct Factors8 {
  float gate[kPack], shift[kTail ? kPack : 1], mean[kTail ? kPack : 1];
};

// (E4), (T3) for eight elements; the bits of those that a ReLU lets through.
template <class T, bool kTail>
__device__ __forceinline__ uint32_t scale(const ScaleSweep& a, const Scaled8<T>& in, const Factors8<kTail>& of,
                                          float (&y)[kPack]) {
  unpack(in.x, y);
#pragma unroll
  for (int j = 0; j < kPack; ++j) {
    if constexpr (kTail)
      y[j] = (y[j] - of.mean[j]) * of.gate[j] + of.shift[j];
    else
      y[j] *= of.gate[j];
  }
  if (a.residual != nullptr) {
    float residual[kPack];
    unpack(in.residual, residual);
#pragma unroll
    for (int j = 0; j < kPack; ++j) y[j] += residual[j];
  }
  uint32_t keep = 0;
  if (a.relu) {
#pragma unroll
    for (int j = 0; j < kPack; ++j) {
      if (y[j] <= 0.0f)
        y[j] = 0.0f;
      else
        keep |= 1u << j;
    }
  }
  return keep;
}

// The thread's positions of its column, which is active.
template <class T, bool kTail>
__device__ __forceinline__ void scale_column(const ScaleSweep& a, const TileAt& at, const Column& mine,
                                             const Factors8<kTail>& of) {
  const int64_t c = a.g.c, n = at.n0 + mine.sample, line = (c + kPack - 1) / kPack;
  const T* x = static_cast<const T*>(a.x) + n * a.x_stride + mine.c;
  const T* residual = a.residual == nullptr ? x : static_cast<const T*>(a.residual) + n * a.residual_stride + mine.c;
  T* y = static_cast<T*>(a.y) + n * a.g.m * c + mine.c;
  uint8_t* mask = a.mask != nullptr ? a.mask + n * a.g.m * line + mine.c / kPack : nullptr;
  const bool whole = a.g.wide && mine.count == kPack;
  const auto use = [&](int p, const Scaled8<T>& in) {
    float v[kPack];
    const uint32_t keep = scale(a, in, of, v);
    if (mask != nullptr) mask[p * line] = static_cast<uint8_t>(keep & low_bits(mine.count));
    if (whole)
      store_pack(y + p * c, pack<T>(v), a.stream_stores);
    else
      store_part(y + p * c, v, 0, mine.count);
  };
  if (whole)
    in_flight<kInFlight<T>>(
        at.p0 + mine.row, at.p1, mine.rows,
        [&](int p) {
          Scaled8<T> in{load_pack<true>(x + p * c), {}};
          if (a.residual != nullptr) in.residual = load_pack<true>(residual + p * c);
          return in;
        },
        use);
  else
    in_flight<1>(
        at.p0 + mine.row, at.p1, mine.rows,
        [&](int p) {
          Scaled8<T> in{load_part(x + p * c, 0, mine.count, a.g.wide), {}};
          if (a.residual != nullptr) in.residual = load_part(residual + p * c, 0, mine.count, a.g.wide);
          return in;
        },
        use);
}

// A vector's values for elements [lo, hi) of a pack of contiguous planes, of which the first is position p of the
// tile's plane k.
__device__ __forceinline__ void over_planes(const float* vector, int k, int p, int lo, int hi, int m,
                                            float (&v)[kPack]) {
  const float first = vector[k];
#pragma unroll
  for (int j = 0; j < kPack; ++j) v[j] = first;
  if (p + hi - lo <= m) return;  // all of one plane
  if (m >= kPack) {              // of two
    const float second = vector[k + 1];
#pragma unroll
    for (int j = 0; j < kPack; ++j) v[j] = j - lo < m - p ? first : second;
    return;
  }
  float value = first;
#pragma unroll
  for (int j = 1; j < kPack; ++j) {
    if (j > lo && j < hi && ++p == m) p = 0, value = vector[++k];
    v[j] = value;
  }
}

// Bits by plane from bits by pack: mask bytes of positions [p0, p1) of the tile's planes. bits: of the packs from the
// one that holds the tile's first element, which is element `begin` of it.
__device__ __forceinline__ void store_mask(uint8_t* mask, const uint8_t* bits, const TileAt& at, int begin, int m) {
  const int line = (m + 7) / 8, first = at.p0 / 8, bytes = (at.p1 + 7) / 8 - first;
  for (int i = thread_index(); i < at.channels * bytes; i += kThreads) {
    const int k = i / bytes, byte = i % bytes, p = 8 * byte;
    mask[static_cast<int64_t>(k) * line + first + byte] =
        static_cast<uint8_t>(bits_at(bits, begin + k * m + p, min(8, at.p1 - at.p0 - p)));
  }
}

// A tile of contiguous planes. vectors: gate of its channels, of a tail gate, shift and mean, `apart` from each other.
// bits: kFlatElements / 8 bytes.
template <class T, bool kTail>
__device__ __forceinline__ void scale_planes(const ScaleSweep& a, const TileAt& at, const float* vectors, int apart,
                                             uint8_t* bits) {
  const int m = a.g.m;
  const int64_t flat = static_cast<int64_t>(at.c0) * m + at.p0, sample = static_cast<int64_t>(a.g.c) * m;
  const int begin = static_cast<int>(flat % kPack), end = begin + (at.channels - 1) * m + at.p1 - at.p0;
  const T* x = static_cast<const T*>(a.x) + at.n0 * a.x_stride + flat - begin;
  const T* residual =
      a.residual == nullptr ? x : static_cast<const T*>(a.residual) + at.n0 * a.residual_stride + flat - begin;
  T* y = static_cast<T*>(a.y) + at.n0 * sample + flat - begin;
  over_packs<kInFlight<T>>(
      begin, end, thread_index(), kThreads, a.g.wide,
      [&](int i) {
        Scaled8<T> in{load_pack<true>(x + i * kPack), {}};
        if (a.residual != nullptr) in.residual = load_pack<true>(residual + i * kPack);
        return in;
      },
      [&](int i, int lo, int hi) {
        Scaled8<T> in{load_part(x + i * kPack, lo, hi, a.g.wide), {}};
        if (a.residual != nullptr) in.residual = load_part(residual + i * kPack, lo, hi, a.g.wide);
        return in;
      },
      [&](int i, int lo, int hi, const Scaled8<T>& in) {
        const int from = i * kPack + lo - begin, k = at.channels == 1 ? 0 : a.by_m.divide(from);
        const int p = at.channels == 1 ? 0 : from - k * m, crossing = at.channels == 1 ? 0 : hi;
        Factors8<kTail> of;
        float v[kPack];
        over_planes(vectors, k, p, lo, crossing, m, of.gate);
        if constexpr (kTail) over_planes(vectors + apart, k, p, lo, crossing, m, of.shift);
        if constexpr (kTail) over_planes(vectors + 2 * apart, k, p, lo, crossing, m, of.mean);
        const uint32_t keep = scale(a, in, of, v);
        if (a.mask != nullptr) bits[i] = static_cast<uint8_t>(keep & low_bits(hi) & ~low_bits(lo));
        if (a.g.wide && hi - lo == kPack)
          store_pack(y + i * kPack, pack<T>(v), a.stream_stores);
        else
          store_part(y + i * kPack, v, lo, hi);
      });
  if (a.mask == nullptr) return;
  __syncthreads();
  store_mask(a.mask + (at.n0 * a.g.c + at.c0) * ((m + 7) / 8), bits, at, begin, m);
}

}  // namespace senet::cuda
