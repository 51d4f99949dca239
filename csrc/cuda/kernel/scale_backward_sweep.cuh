// Second sweeps of the backward over a tile: (B1), and (B6) or a block tail's (T7), from vectors of its channels.
#pragma once
#include "scale_sweep.cuh"

namespace senet::cuda {

struct ScaleBackwardSweep {
  Geometry g;
  Divisor by_m;
  const void *x, *dy;
  int64_t x_stride, dy_stride;
  const uint8_t* mask;   // of the ReLU, or null
  void *dx, *dresidual;  // dense; either may be null
  bool stream_stores;
  bool centred;  // of a tail: x has a say, as it does in the batch's statistics
};

// What dx is made of: dx = gate * g + even, and where x is the peak, `each` more, or slope * (x - mean) more.
enum class Gradient : int { mean, peak, tail };

template <class T>
struct Back8 {
  Pack<T> dy, x;
  uint32_t keep;
};

// What eight elements need to know of their channels.
template <Gradient kOf>
struct Columns8 {
  static constexpr bool kReadsX = kOf != Gradient::mean;
  float gate[kPack], even[kPack];                             // even: what every position gets
  float top[kReadsX ? kPack : 1], each[kReadsX ? kPack : 1];  // the peak and what it gets; of a tail mean and slope
};

// (B1), (B6), (T7) for eight elements.
template <class T, Gradient kOf>
__device__ __forceinline__ void scale_backward(const ScaleBackwardSweep& a, const Back8<T>& in, const Columns8<kOf>& of,
                                               float (&g)[kPack], float (&dx)[kPack]) {
  float x[kPack];
  unpack(in.dy, g);
  if constexpr (kOf == Gradient::peak) unpack(in.x, x);
#pragma unroll
  for (int j = 0; j < kPack; ++j) {
    if ((in.keep >> j & 1u) == 0) g[j] = 0.0f;
    dx[j] = g[j] * of.gate[j] + of.even[j];
    if constexpr (kOf == Gradient::peak) dx[j] += x[j] == of.top[j] ? of.each[j] : of.each[j] * 0.0f;
  }
  if constexpr (kOf == Gradient::tail) {
    if (!a.centred) return;
    unpack(in.x, x);
#pragma unroll
    for (int j = 0; j < kPack; ++j) dx[j] += of.each[j] * (x[j] - of.top[j]);
  }
}

// The thread's positions of its column, which is active.
template <class T, Gradient kOf>
__device__ __forceinline__ void scale_backward_column(const ScaleBackwardSweep& a, const TileAt& at, const Column& mine,
                                                      const Columns8<kOf>& of) {
  const int64_t c = a.g.c, n = at.n0 + mine.sample, line = (c + kPack - 1) / kPack, out = n * a.g.m * c + mine.c;
  const T* x = static_cast<const T*>(a.x) + n * a.x_stride + mine.c;
  const T* dy = static_cast<const T*>(a.dy) + n * a.dy_stride + mine.c;
  const uint8_t* mask = a.mask != nullptr ? a.mask + n * a.g.m * line + mine.c / kPack : nullptr;
  const bool whole = a.g.wide && mine.count == kPack;
  const auto put = [&](void* to, int p, const float (&v)[kPack]) {
    T* at_p = static_cast<T*>(to) + out + p * c;
    if (whole)
      store_pack(at_p, pack<T>(v), a.stream_stores);
    else
      store_part(at_p, v, 0, mine.count);
  };
  const auto use = [&](int p, const Back8<T>& in) {
    float g[kPack], dx[kPack];
    scale_backward(a, in, of, g, dx);
    if (a.dresidual != nullptr) put(a.dresidual, p, g);
    if (a.dx != nullptr) put(a.dx, p, dx);
  };
  const auto keep = [&](int p) { return mask != nullptr ? uint32_t{mask[p * line]} : 255u; };
  const bool reads_x = kOf == Gradient::peak || (kOf == Gradient::tail && a.centred);
  if (whole)
    in_flight<kInFlight<T>>(
        at.p0 + mine.row, at.p1, mine.rows,
        [&](int p) {
          Back8<T> in{load_pack<true>(dy + p * c), {}, keep(p)};
          if (reads_x) in.x = load_pack<true>(x + p * c);
          return in;
        },
        use);
  else
    in_flight<1>(
        at.p0 + mine.row, at.p1, mine.rows,
        [&](int p) {
          Back8<T> in{load_part(dy + p * c, 0, mine.count, a.g.wide), {}, keep(p)};
          if (reads_x) in.x = load_part(x + p * c, 0, mine.count, a.g.wide);
          return in;
        },
        use);
}

// A tile of contiguous planes. vectors: gate, even and where x is read top and each of its channels, kFlatChannels
// apart from each other.
template <class T, Gradient kOf>
__device__ __forceinline__ void scale_backward_planes(const ScaleBackwardSweep& a, const TileAt& at,
                                                      const float* vectors) {
  const int m = a.g.m, line = (m + 7) / 8;
  const int64_t flat = static_cast<int64_t>(at.c0) * m + at.p0;
  const int begin = static_cast<int>(flat % kPack), end = begin + (at.channels - 1) * m + at.p1 - at.p0;
  const int64_t out = at.n0 * a.g.c * m + flat - begin;
  const T* x = static_cast<const T*>(a.x) + at.n0 * a.x_stride + flat - begin;
  const T* dy = static_cast<const T*>(a.dy) + at.n0 * a.dy_stride + flat - begin;
  const uint8_t* mask = a.mask != nullptr ? a.mask + (at.n0 * a.g.c + at.c0) * line : nullptr;
  // Which plane of the tile, and which of its positions, an element lies in.
  const auto plane_of = [&](int from) { return at.channels == 1 ? 0 : static_cast<int>(a.by_m.divide(from)); };
  const auto keep = [&](int i, int lo, int hi) {
    if (mask == nullptr) return 255u;
    const int from = i * kPack + lo - begin, k = plane_of(from);
    return plane_bits(mask + static_cast<int64_t>(k) * line, at.p0 + from - k * m, hi - lo, m) << lo;
  };
  const bool reads_x = kOf == Gradient::peak || (kOf == Gradient::tail && a.centred);
  over_packs<kInFlight<T>>(
      begin, end, thread_index(), kThreads, a.g.wide,
      [&](int i) {
        Back8<T> in{load_pack<true>(dy + i * kPack), {}, keep(i, 0, kPack)};
        if (reads_x) in.x = load_pack<true>(x + i * kPack);
        return in;
      },
      [&](int i, int lo, int hi) {
        Back8<T> in{load_part(dy + i * kPack, lo, hi, a.g.wide), {}, keep(i, lo, hi)};
        if (reads_x) in.x = load_part(x + i * kPack, lo, hi, a.g.wide);
        return in;
      },
      [&](int i, int lo, int hi, const Back8<T>& in) {
        const int from = i * kPack + lo - begin, k = plane_of(from), p = at.channels == 1 ? 0 : from - k * m;
        const int crossing = at.channels == 1 ? 0 : hi;
        Columns8<kOf> of;
        over_planes(vectors, k, p, lo, crossing, m, of.gate);
        over_planes(vectors + kFlatChannels, k, p, lo, crossing, m, of.even);
        if constexpr (Columns8<kOf>::kReadsX) over_planes(vectors + 2 * kFlatChannels, k, p, lo, crossing, m, of.top);
        if constexpr (Columns8<kOf>::kReadsX) over_planes(vectors + 3 * kFlatChannels, k, p, lo, crossing, m, of.each);
        float g[kPack], dx[kPack];
        scale_backward(a, in, of, g, dx);
        const auto put = [&](void* to, const float (&v)[kPack]) {
          if (a.g.wide && hi - lo == kPack)
            store_pack(static_cast<T*>(to) + out + i * kPack, pack<T>(v), a.stream_stores);
          else
            store_part(static_cast<T*>(to) + out + i * kPack, v, lo, hi);
        };
        if (a.dresidual != nullptr) put(a.dresidual, g);
        if (a.dx != nullptr) put(a.dx, dx);
      });
}

// A thread's columns of vectors [samples][channels] (mean and slope: [channels]) that are `apart` from each other;
// zeros where there is no channel, and where no dx is wanted.
template <Gradient kOf>
__device__ __forceinline__ Columns8<kOf> columns_of(const ScaleBackwardSweep& a, const Column& mine,
                                                    const float* vectors, int apart) {
  const int first = mine.sample * a.g.channels + mine.column, of_x = kOf == Gradient::tail ? mine.column : first;
  Columns8<kOf> of;
#pragma unroll
  for (int j = 0; j < kPack; ++j) {
    const bool there = a.dx != nullptr && j < mine.count;
    of.gate[j] = there ? vectors[first + j] : 0.0f;
    of.even[j] = there ? vectors[apart + first + j] : 0.0f;
    if constexpr (Columns8<kOf>::kReadsX) of.top[j] = there ? vectors[2 * apart + of_x + j] : 0.0f;
    if constexpr (Columns8<kOf>::kReadsX) of.each[j] = there ? vectors[3 * apart + of_x + j] : 0.0f;
  }
  return of;
}

}  // namespace senet::cuda
