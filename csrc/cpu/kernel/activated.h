// Sweeps with an activation behind the norm: (P1), (P2) forward, (P3), (P6) backward. Each works out u and the
// activation again, for a tile of elements at a time that stays in the L1, so that one call of a function serves many
// elements whatever the function is.
//
// Sums run in a fixed order that depends on the sizes of one sample alone: tiles of a plane, or of pixels in
// channels_last; within a tile in A, over tiles in double.
#pragma once
#include "../kernels.h"
#include "../vec.h"
#include "functions.h"
#include "scale.h"
#include "squeeze.h"

namespace senet {
namespace SENET_ISA {

constexpr int64_t kTile = 2048;      // elements of a tile, with its rows padded to groups
constexpr int64_t kTilePixels = 32;  // rows of a tile that is summed over pixels
constexpr int64_t kTileWidth = kTile / kTilePixels;

// (P1) for one row.
template <class T, bool kPixelRows>
struct NormalisedRow {
  using A = Acc<T>;
  const T* x;
  PerChannel<A, kPixelRows> mean, weight, bias;
  SENET_INLINE NormalisedRow(const ActivatedArgs<A>& args, int64_t r)
      : x(static_cast<const T*>(args.x) + r * args.columns),
        mean(args.mean, r),
        weight(args.weight, r),
        bias(args.bias, r) {}
  SENET_INLINE Group<A> centred(int64_t i, int count) const { return load_upto(x + i, count) - mean.at(i, count); }
  SENET_INLINE Group<A> u(int64_t i, int count) const {
    return fma(weight.at(i, count), centred(i, count), bias.at(i, count));
  }
};

// u of rows [ra, rb), columns [i0, i1), at to[(r - ra) * stride + i - i0].
template <class T, bool kPixelRows>
SENET_INLINE void fill_tile(const ActivatedArgs<Acc<T>>& args, int64_t ra, int64_t rb, int64_t i0, int64_t i1,
                            int64_t stride, Acc<T>* to) {
  for (int64_t r = ra; r < rb; ++r) {
    const NormalisedRow<T, kPixelRows> row(args, r);
    Acc<T>* line = to + (r - ra) * stride - i0;
    over_groups(i0, i1, [&](int64_t i, int count) __attribute__((always_inline)) { store(line + i, row.u(i, count)); });
  }
}

// Calls f(ra, rb, i0, i1, stride) for tiles that cover rows [r0, r1) of this many columns: several rows, or a part of
// one.
template <class F>
SENET_INLINE void over_tiles(int64_t r0, int64_t r1, int64_t columns, const F& f) {
  const int64_t padded = (columns + kGroup - 1) / kGroup * kGroup;
  if (padded > kTile) {
    for (int64_t r = r0; r < r1; ++r)
      for (int64_t i = 0; i < columns; i += kTile) f(r, r + 1, i, i + kTile < columns ? i + kTile : columns, kTile);
    return;
  }
  const int64_t rows = kTile / padded;
  for (int64_t r = r0; r < r1; r += rows) f(r, r + rows < r1 ? r + rows : r1, 0, columns, padded);
}

// sums[k * sums_stride + c] of kSums terms over the positions of channels [c0, c1). prepare(ra, rb, i0, i1, stride)
// makes a tile ready; add(r, i, count, at, s) adds the terms of one group, which is at `at` in the tile, to the groups
// s[k]. totals: kSums * columns doubles, for pixels.
template <class A, bool kPixelRows, int kSums, class Prepare, class Add>
SENET_INLINE void sum_tiles(int64_t rows, int64_t columns, int64_t c0, int64_t c1, A* sums, int64_t sums_stride,
                            double* totals, const Prepare& prepare, const Add& add) {
  Group<A> s[kSums];
  const auto clear = [&s]() __attribute__((always_inline)) {
    for (int k = 0; k < kSums; ++k) s[k] = splat<A>(0);
  };
  if (!kPixelRows) {
    double running[kSums];
    over_tiles(c0, c1, columns, [&](int64_t ra, int64_t rb, int64_t i0, int64_t i1, int64_t stride) {
      prepare(ra, rb, i0, i1, stride);
      for (int64_t r = ra; r < rb; ++r) {
        clear();
        over_groups(i0, i1, [&](int64_t i, int count) __attribute__((always_inline)) {
          add(r, i, count, (r - ra) * stride + i - i0, s);
        });
        for (int k = 0; k < kSums; ++k) {
          running[k] = (i0 == 0 ? 0 : running[k]) + sum_of_lanes(s[k]);
          if (i1 == columns) sums[k * sums_stride + r] = A(running[k]);
        }
      }
    });
    return;
  }
  for (int k = 0; k < kSums; ++k)
    for (int64_t c = c0; c < c1; ++c) totals[k * columns + c] = 0;
  for (int64_t p0 = 0; p0 < rows; p0 += kTilePixels) {
    const int64_t p1 = p0 + kTilePixels < rows ? p0 + kTilePixels : rows;
    for (int64_t i0 = c0; i0 < c1; i0 += kTileWidth) {
      const int64_t i1 = i0 + kTileWidth < c1 ? i0 + kTileWidth : c1;
      prepare(p0, p1, i0, i1, kTileWidth);
      over_groups(i0, i1, [&](int64_t i, int count) __attribute__((always_inline)) {
        clear();
        for (int64_t p = p0; p < p1; ++p) add(p, i, count, (p - p0) * kTileWidth + i - i0, s);
        for (int k = 0; k < kSums; ++k) {
          A lanes[kGroup];
          store(lanes, s[k]);
          for (int j = 0; j < count; ++j) totals[k * columns + i + j] += lanes[j];
        }
      });
    }
  }
  for (int k = 0; k < kSums; ++k)
    for (int64_t c = c0; c < c1; ++c) sums[k * sums_stride + c] = A(totals[k * columns + c]);
}

// (P1): the sum of the activated values.
template <class T, bool kPixelRows>
void activated_sum(const ActivatedArgs<Acc<T>>& args, int64_t c0, int64_t c1, double* totals) {
  using A = Acc<T>;
  A a[kTile];
  sum_tiles<A, kPixelRows, 1>(
      args.rows, args.columns, c0, c1, args.sums, 0, totals,
      [&](int64_t ra, int64_t rb, int64_t i0, int64_t i1, int64_t stride) {
        fill_tile<T, kPixelRows>(args, ra, rb, i0, i1, stride, a);
        function_values<A>(args.f, args.p0, 0, a, a, (rb - ra) * stride);
      },
      [&](int64_t, int64_t, int count, int64_t at, Group<A>* s)
          __attribute__((always_inline)) { s[0] = s[0] + load_upto(a + at, count); });
}

// (P2)
template <class T, bool kPixelRows, bool kScale, bool kResidual, bool kRelu, bool kStream>
void activated_scale_rows(const ActivatedArgs<Acc<T>>& args, int64_t r0, int64_t r1) {
  using A = Acc<T>;
  const int64_t columns = args.columns, mask_stride = (columns + 7) / 8;
  A a[kTile];
  over_tiles(r0, r1, columns, [&](int64_t ra, int64_t rb, int64_t i0, int64_t i1, int64_t stride) {
    fill_tile<T, kPixelRows>(args, ra, rb, i0, i1, stride, a);
    function_values<A>(args.f, args.p0, 0, a, a, (rb - ra) * stride);
    for (int64_t r = ra; r < rb; ++r) {
      const T* residual = kResidual ? static_cast<const T*>(args.residual) + r * columns : nullptr;
      T* y = static_cast<T*>(args.y) + r * columns;
      uint8_t* mask = kRelu && args.mask_out != nullptr ? args.mask_out + r * mask_stride : nullptr;
      const PerChannel<A, kPixelRows> scale(kScale ? args.scale : nullptr, r);
      const A* line = a + (r - ra) * stride - i0;
      over_groups(i0, i1, [&](int64_t i, int count) __attribute__((always_inline)) {
        Group<A> v = load(line + i);
        if (kScale && kResidual)
          v = fma(scale.at(i, count), v, load_upto(residual + i, count));
        else if (kScale)
          v = scale.at(i, count) * v;
        else if (kResidual)
          v = v + load_upto(residual + i, count);
        if (kRelu) v = relu_and_mask(v, mask != nullptr ? mask + i / 8 : nullptr, count);
        put<kStream>(y + i, v, count);
      });
    }
  });
  if (kStream) end_of_stream();
}

template <class T, bool kPixelRows>
void activated_scale(const ActivatedArgs<Acc<T>>& args, int64_t r0, int64_t r1) {
  choose(
      [&](auto scale, auto residual, auto relu, auto stream) {
        activated_scale_rows<T, kPixelRows, scale.value, residual.value, relu.value, stream.value>(args, r0, r1);
      },
      args.scale != nullptr, args.residual != nullptr, args.relu, args.stream && can_stream<T>(args.y, args.columns));
}

// (P3), with x - mean for xhat. With a gate: S0, S1, S2, S3, S4; without: S1, S3.
template <class T, bool kPixelRows, bool kMask, bool kGated>
void activated_moments_impl(const ActivatedArgs<Acc<T>>& args, int64_t c0, int64_t c1, double* totals) {
  using A = Acc<T>;
  const int64_t columns = args.columns, mask_stride = (columns + 7) / 8;
  A a[kTile], slope[kTile];
  sum_tiles<A, kPixelRows, kGated ? 5 : 2>(
      args.rows, columns, c0, c1, args.sums, args.sums_stride, totals,
      [&](int64_t ra, int64_t rb, int64_t i0, int64_t i1, int64_t stride) {
        fill_tile<T, kPixelRows>(args, ra, rb, i0, i1, stride, a);
        function_values_and_slopes<A>(args.f, args.p0, 0, a, a, slope, (rb - ra) * stride);
      },
      [&](int64_t r, int64_t i, int count, int64_t at, Group<A>* s) __attribute__((always_inline)) {
        const T* dy = static_cast<const T*>(args.dy) + r * columns + i;
        const uint8_t* mask = kMask ? args.mask + r * mask_stride + i / 8 : nullptr;
        const Group<A> g = masked_gradient<T, kMask>(dy, mask, nullptr, count);
        const NormalisedRow<T, kPixelRows> row(args, r);
        const Group<A> centred = row.centred(i, count), d = load_upto(slope + at, count), into = g * d;
        if (kGated) {
          s[0] = fma(g, load_upto(a + at, count), s[0]);
          s[1] = s[1] + into;
          s[2] = s[2] + d;
          s[3] = fma(into, centred, s[3]);
          s[4] = fma(d, centred, s[4]);
        } else {
          s[0] = s[0] + into;
          s[1] = fma(into, centred, s[1]);
        }
      });
}

template <class T, bool kPixelRows>
void activated_moments(const ActivatedArgs<Acc<T>>& args, int64_t c0, int64_t c1, double* totals) {
  choose([&](auto mask,
             auto gated) { activated_moments_impl<T, kPixelRows, mask.value, gated.value>(args, c0, c1, totals); },
         args.mask != nullptr, args.gated);
}

// (P6): dx = (scale * g + pooled) * a' + slope * (x - mean) + shift.
template <class T, bool kPixelRows, bool kMask, bool kResidual, bool kBatch, bool kStream>
void activated_gradient_rows(const ActivatedArgs<Acc<T>>& args, int64_t r0, int64_t r1) {
  using A = Acc<T>;
  const int64_t columns = args.columns, mask_stride = (columns + 7) / 8;
  A a[kTile], slopes[kTile];
  over_tiles(r0, r1, columns, [&](int64_t ra, int64_t rb, int64_t i0, int64_t i1, int64_t stride) {
    fill_tile<T, kPixelRows>(args, ra, rb, i0, i1, stride, a);
    function_values_and_slopes<A>(args.f, args.p0, 0, a, a, slopes, (rb - ra) * stride);
    for (int64_t r = ra; r < rb; ++r) {
      const T* dy = static_cast<const T*>(args.dy) + r * columns;
      T* dx = static_cast<T*>(args.dx) + r * columns;
      T* dresidual = kResidual ? static_cast<T*>(args.dresidual) + r * columns : nullptr;
      const uint8_t* mask = kMask ? args.mask + r * mask_stride : nullptr;
      const NormalisedRow<T, kPixelRows> row(args, r);
      const PerChannel<A, kPixelRows> scale(args.scale, r), pooled(args.pooled, r);
      const PerChannel<A, kPixelRows> slope(kBatch ? args.slope : nullptr, r), shift(kBatch ? args.shift : nullptr, r);
      const A* line = slopes + (r - ra) * stride - i0;
      over_groups(i0, i1, [&](int64_t i, int count) __attribute__((always_inline)) {
        const Group<A> g = masked_gradient<T, kMask>(dy + i, kMask ? mask + i / 8 : nullptr, nullptr, count);
        if (kResidual) put<kStream>(dresidual + i, g, count);
        const Group<A> into = fma(scale.at(i, count), g, pooled.at(i, count));
        if (kBatch) {
          const Group<A> rest = fma(slope.at(i, count), row.centred(i, count), shift.at(i, count));
          put<kStream>(dx + i, fma(into, load(line + i), rest), count);
        } else {
          put<kStream>(dx + i, into * load(line + i), count);
        }
      });
    }
  });
  if (kStream) end_of_stream();
}

template <class T, bool kPixelRows>
void activated_gradient(const ActivatedArgs<Acc<T>>& args, int64_t r0, int64_t r1) {
  const bool aligned = can_stream<T>(args.dx, args.columns) &&
                       (args.dresidual == nullptr || can_stream<T>(args.dresidual, args.columns));
  choose(
      [&](auto mask, auto residual, auto batch, auto stream) {
        if constexpr (mask.value || !residual.value)  // a residual's gradient is dy where there is no mask
          activated_gradient_rows<T, kPixelRows, mask.value, residual.value, batch.value, stream.value>(args, r0, r1);
      },
      args.mask != nullptr, args.dresidual != nullptr, args.slope != nullptr, args.stream && aligned);
}

}  // namespace SENET_ISA
}  // namespace senet
