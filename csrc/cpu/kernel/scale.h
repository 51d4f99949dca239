// Second sweeps: (E4) forward, (B6) backward. A row is a plane with one gate, or a pixel with a gate for each element.
#pragma once
#include "../kernels.h"
#include "../vec.h"
#include "squeeze.h"

namespace senet {
namespace SENET_ISA {

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

template <class T, bool kPixelRows, bool kResidual, bool kRelu, bool kStream>
void scale_rows(const ScaleArgs<Acc<T>>& args, int64_t r0, int64_t r1) {
  using A = Acc<T>;
  const int64_t columns = args.columns, mask_stride = (columns + 7) / 8;
  for (int64_t r = r0; r < r1; ++r) {
    const T* x = static_cast<const T*>(args.x) + r * columns;
    const T* residual = kResidual ? static_cast<const T*>(args.residual) + r * columns : nullptr;
    T* y = static_cast<T*>(args.y) + r * columns;
    uint8_t* mask = kRelu && args.mask != nullptr ? args.mask + r * mask_stride : nullptr;
    const PerChannel<A, kPixelRows> gate(args.gate, r);
    const auto group = [&](int64_t i, int count) __attribute__((always_inline)) {
      const Group<A> scaled = load_upto(x + i, count);
      Group<A> v;
      if (kResidual)
        v = fma(gate.at(i, count), scaled, load_upto(residual + i, count));
      else
        v = gate.at(i, count) * scaled;
      if (kRelu) {
        if (mask != nullptr) {
          const uint16_t bits = positive_lanes(v);
          mask[i / 8] = uint8_t(bits);
          if (count > 8) mask[i / 8 + 1] = uint8_t(bits >> 8);
        }
        v = relu(v);
      }
      put<kStream>(y + i, v, count);
    };
    int64_t i = 0;
    for (; i + kGroup <= columns; i += kGroup) group(i, kGroup);
    if (i < columns) group(i, int(columns - i));
  }
  if (kStream) end_of_stream();
}

template <class T, bool kPixelRows, bool kResidual, bool kRelu>
void scale_choose_store(const ScaleArgs<Acc<T>>& args, int64_t r0, int64_t r1) {
  if (args.stream && can_stream<T>(args.y, args.columns))
    scale_rows<T, kPixelRows, kResidual, kRelu, true>(args, r0, r1);
  else
    scale_rows<T, kPixelRows, kResidual, kRelu, false>(args, r0, r1);
}

template <class T, bool kPixelRows>
void scale(const ScaleArgs<Acc<T>>& args, int64_t r0, int64_t r1) {
  if (args.residual != nullptr) {
    if (args.relu)
      scale_choose_store<T, kPixelRows, true, true>(args, r0, r1);
    else
      scale_choose_store<T, kPixelRows, true, false>(args, r0, r1);
  } else {
    if (args.relu)
      scale_choose_store<T, kPixelRows, false, true>(args, r0, r1);
    else
      scale_choose_store<T, kPixelRows, false, false>(args, r0, r1);
  }
}

template <class T, bool kPixelRows, bool kMask, bool kPeak, bool kStream>
void apply_rows(const ApplyArgs<Acc<T>>& args, int64_t r0, int64_t r1) {
  using A = Acc<T>;
  const int64_t columns = args.columns, mask_stride = (columns + 7) / 8;
  for (int64_t r = r0; r < r1; ++r) {
    const T* g = static_cast<const T*>(args.g) + r * columns;
    const T* x = kPeak ? static_cast<const T*>(args.x) + r * columns : nullptr;
    T* dx = static_cast<T*>(args.dx) + r * columns;
    const uint8_t* mask = kMask ? args.mask + r * mask_stride : nullptr;
    const PerChannel<A, kPixelRows> gate(args.gate, r), shift(args.shift, r);
    const PerChannel<A, kPixelRows> peak(kPeak ? args.peak : nullptr, r), at_peak(kPeak ? args.at_peak : nullptr, r);
    const auto group = [&](int64_t i, int count) __attribute__((always_inline)) {
      const Group<A> gradient = masked_gradient<T, kMask>(g + i, kMask ? mask + i / 8 : nullptr, nullptr, count);
      Group<A> rest = shift.at(i, count);
      if (kPeak) rest = where_equal(load_upto(x + i, count), peak.at(i, count), at_peak.at(i, count), rest);
      const Group<A> v = fma(gate.at(i, count), gradient, rest);
      put<kStream>(dx + i, v, count);
    };
    int64_t i = 0;
    for (; i + kGroup <= columns; i += kGroup) group(i, kGroup);
    if (i < columns) group(i, int(columns - i));
  }
  if (kStream) end_of_stream();
}

template <class T, bool kPixelRows, bool kMask, bool kPeak>
void apply_choose_store(const ApplyArgs<Acc<T>>& args, int64_t r0, int64_t r1) {
  if (args.stream && can_stream<T>(args.dx, args.columns))
    apply_rows<T, kPixelRows, kMask, kPeak, true>(args, r0, r1);
  else
    apply_rows<T, kPixelRows, kMask, kPeak, false>(args, r0, r1);
}

template <class T, bool kPixelRows>
void apply(const ApplyArgs<Acc<T>>& args, int64_t r0, int64_t r1) {
  if (args.peak != nullptr) {
    if (args.mask != nullptr)
      apply_choose_store<T, kPixelRows, true, true>(args, r0, r1);
    else
      apply_choose_store<T, kPixelRows, false, true>(args, r0, r1);
  } else {
    if (args.mask != nullptr)
      apply_choose_store<T, kPixelRows, true, false>(args, r0, r1);
    else
      apply_choose_store<T, kPixelRows, false, false>(args, r0, r1);
  }
}

}  // namespace SENET_ISA
}  // namespace senet
