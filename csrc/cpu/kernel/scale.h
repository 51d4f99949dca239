// Second sweeps: (E4) forward, (B6) backward. A row is a plane with one gate, or a pixel with a gate for each element.
#pragma once
#include "../kernels.h"
#include "../vec.h"
#include "squeeze.h"

namespace senet {
namespace SENET_ISA {

// Calls f(i, count) for the groups of [begin, end).
template <class F>
SENET_INLINE void over_groups(int64_t begin, int64_t end, const F& f) {
  int64_t i = begin;
  for (; i + kGroup <= end; i += kGroup) f(i, kGroup);
  if (i < end) f(i, int(end - i));
}

// A row's own value (planes), or the value of each column (pixels).
template <class A, bool kPixelRows>
struct PerChannel {
  const A* values;
  Group<A> row;
  SENET_INLINE PerChannel(const A* v, int64_t r) : values(v), row(splat<A>(kPixelRows || v == nullptr ? A(0) : v[r])) {}
  SENET_INLINE Group<A> at(int64_t i, int count) const {
    if (!kPixelRows) return row;
    return load_upto(values + i, count);
  }
};

template <bool kStream, class T, class A>
SENET_INLINE void put(T* to, const Group<A>& g, int count) {
  if (count < kGroup)
    store_part(to, g, count);
  else if (kStream)
    stream(to, g);
  else
    store(to, g);
}

// Streaming stores need every group of every row on a group's boundary.
template <class T>
SENET_INLINE bool can_stream(const void* base, int64_t columns) {
  return reinterpret_cast<uintptr_t>(base) % (kGroup * sizeof(T)) == 0 && columns % kGroup == 0;
}

// A ReLU, and the bits of what it lets through if there is a mask.
template <class A>
SENET_INLINE Group<A> relu_and_mask(const Group<A>& v, uint8_t* mask, int count) {
  if (mask != nullptr) {
    const uint16_t bits = positive_lanes(v);
    mask[0] = uint8_t(bits);
    if (count > 8) mask[1] = uint8_t(bits >> 8);
  }
  return relu(v);
}

// (E4): v = scale * x + residual; kNorm, (T3): v = scale * (x - mean) + shift + residual.
template <class T, bool kPixelRows, bool kNorm, bool kResidual, bool kRelu, bool kStream>
void scale_rows(const ScaleArgs<Acc<T>>& args, int64_t r0, int64_t r1) {
  using A = Acc<T>;
  const int64_t columns = args.columns, mask_stride = (columns + 7) / 8;
  for (int64_t r = r0; r < r1; ++r) {
    const T* x = static_cast<const T*>(args.x) + r * columns;
    const T* residual = kResidual ? static_cast<const T*>(args.residual) + r * columns : nullptr;
    T* y = static_cast<T*>(args.y) + r * columns;
    uint8_t* mask = kRelu && args.mask != nullptr ? args.mask + r * mask_stride : nullptr;
    const PerChannel<A, kPixelRows> scale(args.scale, r);
    const PerChannel<A, kPixelRows> mean(kNorm ? args.mean : nullptr, r), shift(kNorm ? args.shift : nullptr, r);
    const auto group = [&](int64_t i, int count) __attribute__((always_inline)) {
      Group<A> v = load_upto(x + i, count);
      if (kNorm) {
        const Group<A> centred = v - mean.at(i, count);
        v = fma(scale.at(i, count), centred, shift.at(i, count));
        if (kResidual) v = v + load_upto(residual + i, count);
      } else if (kResidual) {
        v = fma(scale.at(i, count), v, load_upto(residual + i, count));
      } else {
        v = scale.at(i, count) * v;
      }
      if (kRelu) v = relu_and_mask(v, mask != nullptr ? mask + i / 8 : nullptr, count);
      put<kStream>(y + i, v, count);
    };
    over_groups(0, columns, group);
  }
  if (kStream) end_of_stream();
}

template <class T, bool kPixelRows>
void scale(const ScaleArgs<Acc<T>>& args, int64_t r0, int64_t r1) {
  choose(
      [&](auto norm, auto residual, auto relu, auto stream) {
        scale_rows<T, kPixelRows, norm.value, residual.value, relu.value, stream.value>(args, r0, r1);
      },
      args.mean != nullptr, args.residual != nullptr, args.relu, args.stream && can_stream<T>(args.y, args.columns));
}

// dx = scale * g + shift; kSlope: + slope * (x - mean); kPeak: at_peak in the place of shift where x is the peak.
template <class T, bool kPixelRows, bool kMask, bool kResidual, bool kSlope, bool kPeak, bool kStream>
void gradient_rows(const GradientArgs<Acc<T>>& args, int64_t r0, int64_t r1) {
  using A = Acc<T>;
  const int64_t columns = args.columns, mask_stride = (columns + 7) / 8;
  for (int64_t r = r0; r < r1; ++r) {
    const T* dy = static_cast<const T*>(args.dy) + r * columns;
    const T* x = kSlope || kPeak ? static_cast<const T*>(args.x) + r * columns : nullptr;
    T* dx = static_cast<T*>(args.dx) + r * columns;
    T* dresidual = kResidual ? static_cast<T*>(args.dresidual) + r * columns : nullptr;
    const uint8_t* mask = kMask ? args.mask + r * mask_stride : nullptr;
    const PerChannel<A, kPixelRows> scale(args.scale, r), shift(args.shift, r);
    const PerChannel<A, kPixelRows> mean(kSlope ? args.mean : nullptr, r), slope(kSlope ? args.slope : nullptr, r);
    const PerChannel<A, kPixelRows> peak(kPeak ? args.peak : nullptr, r), at_peak(kPeak ? args.at_peak : nullptr, r);
    const auto group = [&](int64_t i, int count) __attribute__((always_inline)) {
      const Group<A> g = masked_gradient<T, kMask>(dy + i, kMask ? mask + i / 8 : nullptr, nullptr, count);
      if (kResidual) put<kStream>(dresidual + i, g, count);
      Group<A> rest = shift.at(i, count);
      if (kSlope) rest = fma(slope.at(i, count), load_upto(x + i, count) - mean.at(i, count), rest);
      if (kPeak) rest = where_equal(load_upto(x + i, count), peak.at(i, count), at_peak.at(i, count), rest);
      put<kStream>(dx + i, fma(scale.at(i, count), g, rest), count);
    };
    over_groups(0, columns, group);
  }
  if (kStream) end_of_stream();
}

template <class T, bool kPixelRows>
void gradient(const GradientArgs<Acc<T>>& args, int64_t r0, int64_t r1) {
  const bool aligned = can_stream<T>(args.dx, args.columns) &&
                       (args.dresidual == nullptr || can_stream<T>(args.dresidual, args.columns));
  choose(
      [&](auto mask, auto residual, auto slope, auto peak, auto stream) {
        // A residual's gradient is g where there is no mask, and a maximum in the squeeze does not go with a norm.
        if constexpr ((mask.value || !residual.value) && !(slope.value && peak.value))
          gradient_rows<T, kPixelRows, mask.value, residual.value, slope.value, peak.value, stream.value>(args, r0, r1);
      },
      args.mask != nullptr, args.dresidual != nullptr, args.slope != nullptr, args.peak != nullptr,
      args.stream && aligned);
}

}  // namespace SENET_ISA
}  // namespace senet
