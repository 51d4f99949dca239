// The second sweep of the backward: (B4) to (B6), and (B7) in the first blocks of the launch.
#pragma once
#include "scale.cuh"
#include "weight_gradients.cuh"

namespace senet::cuda {

static_assert(kWeightMemory >= 2 * kMaxColumns && kWeightMemory >= 4 * kFlatChannels, "vectors share the memory");

struct ScaleBackwardArguments {
  Geometry g;
  Divisor by_m;
  const void *x, *dy;  // x: with a peak
  int64_t x_stride, dy_stride;
  const uint8_t* mask;   // of the ReLU, or null
  const float* gate;     // [n, c]
  void *dx, *dresidual;  // dense; either may be null
  Bottleneck excite;
  const float* dpreact;       // "last_block": [n, r]
  const float* dpooled;       // "launches": [n, c]
  const float *peaks, *ties;  // [n, c] with a stride of their own, with a peak
  int64_t peaks_stride;
  float inv_m;
  bool half;  // of the gradient goes to the peak, the other half to all
  bool stream_stores;
  CudaStrategy strategy;
  WeightArguments weights;
  unsigned weight_tiles;  // the first so many blocks
};

template <class T>
struct Back8 {
  Pack<T> dy, x;
  uint32_t keep;
};

// What eight elements need to know of their channels.
template <bool kPeak>
struct Columns8 {
  float gate[kPack], even[kPack];  // even: what every position gets of dpooled
  float top[kPeak ? kPack : 1], each[kPeak ? kPack : 1];
};

// (B1), (B6) for eight elements.
template <class T, bool kPeak>
__device__ __forceinline__ void scale_backward(const Back8<T>& in, const Columns8<kPeak>& of, float (&g)[kPack],
                                               float (&dx)[kPack]) {
  float x[kPack];
  unpack(in.dy, g);
  if constexpr (kPeak) unpack(in.x, x);
#pragma unroll
  for (int j = 0; j < kPack; ++j) {
    if ((in.keep >> j & 1u) == 0) g[j] = 0.0f;
    dx[j] = g[j] * of.gate[j] + of.even[j];
    if constexpr (kPeak) dx[j] += x[j] == of.top[j] ? of.each[j] : of.each[j] * 0.0f;
  }
}

// gate, even, top and each of the tile's channels, four vectors of [samples][stride] in shared memory (two without a
// peak), `apart` from each other.
template <bool kPeak>
__device__ __forceinline__ void columns_of(const ScaleBackwardArguments& a, const TileAt& at, float* vectors, int apart,
                                           int stride, float* block, float* scratch) {
  float *gate = vectors, *even = vectors + apart;
  if (a.dx == nullptr) return;
  if constexpr (!kPeak)  // with a peak the launches between the sweeps have made it
    if (a.strategy != CudaStrategy::launches)
      make_dpooled<InSweep>(a.excite, patch_of(a.g, at), a.strategy == CudaStrategy::last_block ? a.dpreact : nullptr,
                            even, stride, block, scratch);
  for (int i = thread_index(); i < at.samples * at.channels; i += kThreads) {
    const int s = i / at.channels, c = i % at.channels, k = s * stride + c;
    const int64_t n = at.n0 + s, nc = n * a.g.c + at.c0 + c;
    const float dpooled = a.strategy == CudaStrategy::launches ? a.dpooled[nc] : even[k];
    gate[k] = a.gate[nc];
    even[k] = kPeak && !a.half ? 0.0f : dpooled * a.inv_m * (kPeak ? 0.5f : 1.0f);
    if constexpr (kPeak) {
      vectors[2 * apart + k] = a.peaks[n * a.peaks_stride + at.c0 + c];
      vectors[3 * apart + k] = dpooled / a.ties[n * a.peaks_stride + at.c0 + c] * (a.half ? 0.5f : 1.0f);
    }
  }
  __syncthreads();
}

template <class T, bool kPeak>
__global__ void __launch_bounds__(kThreads, 2) scale_backward_channels_last_kernel(const ScaleBackwardArguments a) {
  SENET_SHARED(float, scratch, kScratch);
  SENET_SHARED(float, vectors, kPeak ? 4 * kMaxColumns : kWeightMemory);
  SENET_SHARED(float, block, kMostSamples* kReduced);
  wait_for_previous();
  if (blockIdx.x < a.weight_tiles) return weight_gradients(a.excite, a.weights, blockIdx.x, vectors);
  const TileAt at(a.g, gridDim.x - 1 - blockIdx.x);
  const Column mine(a.g, at);
  const int first = mine.sample * a.g.channels + mine.column, apart = a.g.samples * a.g.channels;
  columns_of<kPeak>(a, at, vectors, apart, a.g.channels, block, scratch);
  if (!mine.active) return;
  Columns8<kPeak> of;
#pragma unroll
  for (int j = 0; j < kPack; ++j) {
    const bool there = a.dx != nullptr && j < mine.count;
    of.gate[j] = there ? vectors[first + j] : 0.0f;
    of.even[j] = there ? vectors[apart + first + j] : 0.0f;
    if constexpr (kPeak) of.top[j] = there ? vectors[2 * apart + first + j] : 0.0f;
    if constexpr (kPeak) of.each[j] = there ? vectors[3 * apart + first + j] : 0.0f;
  }
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
    scale_backward(in, of, g, dx);
    if (a.dresidual != nullptr) put(a.dresidual, p, g);
    if (a.dx != nullptr) put(a.dx, p, dx);
  };
  const auto keep = [&](int p) { return mask != nullptr ? uint32_t{mask[p * line]} : 255u; };
  if (whole)
    in_flight<kInFlight<T>>(
        at.p0 + mine.row, at.p1, mine.rows,
        [&](int p) {
          Back8<T> in{load_pack<true>(dy + p * c), {}, keep(p)};
          if constexpr (kPeak) in.x = load_pack<true>(x + p * c);
          return in;
        },
        use);
  else
    in_flight<1>(
        at.p0 + mine.row, at.p1, mine.rows,
        [&](int p) {
          Back8<T> in{load_part(dy + p * c, 0, mine.count, a.g.wide), {}, keep(p)};
          if constexpr (kPeak) in.x = load_part(x + p * c, 0, mine.count, a.g.wide);
          return in;
        },
        use);
}

template <class T, bool kPeak>
__global__ void __launch_bounds__(kThreads, 2) scale_backward_planes_kernel(const ScaleBackwardArguments a) {
  SENET_SHARED(float, scratch, kScratch);
  SENET_SHARED(float, vectors, kWeightMemory);
  SENET_SHARED(float, block, kReduced);
  wait_for_previous();
  if (blockIdx.x < a.weight_tiles) return weight_gradients(a.excite, a.weights, blockIdx.x, vectors);
  const TileAt at(a.g, gridDim.x - 1 - blockIdx.x);
  columns_of<kPeak>(a, at, vectors, kFlatChannels, a.g.channels, block, scratch);
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
  over_packs<kInFlight<T>>(
      begin, end, thread_index(), kThreads, a.g.wide,
      [&](int i) {
        Back8<T> in{load_pack<true>(dy + i * kPack), {}, keep(i, 0, kPack)};
        if constexpr (kPeak) in.x = load_pack<true>(x + i * kPack);
        return in;
      },
      [&](int i, int lo, int hi) {
        Back8<T> in{load_part(dy + i * kPack, lo, hi, a.g.wide), {}, keep(i, lo, hi)};
        if constexpr (kPeak) in.x = load_part(x + i * kPack, lo, hi, a.g.wide);
        return in;
      },
      [&](int i, int lo, int hi, const Back8<T>& in) {
        const int from = i * kPack + lo - begin, k = plane_of(from), p = at.channels == 1 ? 0 : from - k * m;
        const int crossing = at.channels == 1 ? 0 : hi;
        Columns8<kPeak> of;
        over_planes(vectors, k, p, lo, crossing, m, of.gate);
        over_planes(vectors + kFlatChannels, k, p, lo, crossing, m, of.even);
        if constexpr (kPeak) over_planes(vectors + 2 * kFlatChannels, k, p, lo, crossing, m, of.top);
        if constexpr (kPeak) over_planes(vectors + 3 * kFlatChannels, k, p, lo, crossing, m, of.each);
        float g[kPack], dx[kPack];
        scale_backward(in, of, g, dx);
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

}  // namespace senet::cuda
