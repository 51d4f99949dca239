// First sweeps with a norm: (T1) forward, (T4) backward.
//
// Sums run in a fixed order that depends on the sizes of one sample alone: blocks of kBlock elements along a plane, of
// pixels_of_block pixels in channels_last; within a block in A, over blocks in double.
#pragma once
#include "../kernels.h"
#include "../vec.h"
#include "squeeze.h"

namespace senet {
namespace SENET_ISA {

// Pixels that are summed together: what they read stays near while the channels are gone through, sixteen at a time,
// and the next block is on its way from memory.
SENET_INLINE int64_t pixels_of_block(int64_t row_bytes) {
  const int64_t fitting = 65536 / row_bytes;
  return fitting < 4 ? 4 : fitting > 64 ? 64 : fitting;
}

// Groups of channels that are summed side by side, in registers: rows are read in runs that memory is fast at.
constexpr int kStrip = 4;

template <int kGroups>
struct Strip {
  static constexpr int groups = kGroups;
};

// Calls f(Strip, i, count) for strips of channels that cover [c0, c1), the last group of each `count` wide.
template <class F>
SENET_INLINE void over_strips(int64_t c0, int64_t c1, const F& f) {
  int64_t i = c0;
  for (; i + kStrip * kGroup <= c1; i += kStrip * kGroup) f(Strip<kStrip>(), i, kGroup);
  for (; i < c1; i += kGroup) f(Strip<1>(), i, c1 - i < kGroup ? int(c1 - i) : kGroup);
}

template <class T>
constexpr int kGroupsOfLine = kGroup * sizeof(T) < 64 ? 64 / (kGroup * sizeof(T)) : 1;

// ------------------------------------------------------------------------------------------------ moments (T1)

// Adds a block of `count` values with this mean and sum of squared deviations to the `before` values of *mean, *squares
// (Chan, Golub & LeVeque 1983).
SENET_INLINE void merge_moments(double before, double count, double mean, double squares, double* total_mean,
                                double* total_squares) {
  const double delta = mean - *total_mean, share = count / (before + count);
  *total_mean += delta * share;
  *total_squares += squares + delta * delta * before * share;
}

// Deviations are taken from the mean of the first values of a block: close enough that their squares do not cancel.
constexpr int64_t kProbe = 4;

// The mean of a channel that is not finite: deviations from an infinite value have lost its sign.
template <class T>
double plain_mean(const T* x, int64_t stride, int64_t m) {
  double sum = 0;
  for (int64_t p = 0; p < m; ++p) sum += sum_of_lanes(load_upto(x + p * stride, 1));
  return sum / double(m);
}

template <class T>
void moments_planes(const void* x, int64_t m, int64_t c0, int64_t c1, double* mean, Acc<T>* squares) {
  using A = Acc<T>;
  for (int64_t c = c0; c < c1; ++c) {
    const T* plane = static_cast<const T*>(x) + c * m;
    double total_mean = 0, total_squares = 0;
    for (int64_t begin = 0; begin < m; begin += kBlock) {
      const int64_t end = begin + kBlock < m ? begin + kBlock : m;
      const int64_t probe_end = begin + kProbe * kGroup < end ? begin + kProbe * kGroup : end;
      Group<A> first = splat<A>(0);
      for (int64_t i = begin; i < probe_end; i += kGroup)
        first = first + load_upto(plane + i, probe_end - i < kGroup ? int(probe_end - i) : kGroup);
      const A near = sum_of_lanes(first) / A(probe_end - begin);
      const Group<A> shift = splat<A>(near);
      Group<A> d0 = splat<A>(0), d1 = d0, q0 = d0, q1 = d0;
      int64_t i = begin;
      for (; i + 2 * kGroup <= end; i += 2 * kGroup) {
        const Group<A> a = load(plane + i) - shift, b = load(plane + i + kGroup) - shift;
        d0 = d0 + a;
        d1 = d1 + b;
        q0 = fma(a, a, q0);
        q1 = fma(b, b, q1);
      }
      for (; i < end; i += kGroup) {
        const int count = end - i < kGroup ? int(end - i) : kGroup;
        // The lanes behind the end hold zero: they are to deviate by nothing.
        const Group<A> a = keep_lanes(load_upto(plane + i, count) - shift, uint16_t((1u << count) - 1));
        d0 = d0 + a;
        q0 = fma(a, a, q0);
      }
      const double count = double(end - begin), d = sum_of_lanes(d0 + d1), q = sum_of_lanes(q0 + q1);
      merge_moments(double(begin), count, near + d / count, q - d * d / count, &total_mean, &total_squares);
    }
    mean[c] = total_mean == total_mean ? total_mean : plain_mean(plane, 1, m);
    squares[c] = A(total_squares > 0 || total_squares != total_squares ? total_squares : 0);
  }
}

// The blocks of one strip of kGroups groups of channels, of which the last has `count` channels.
template <class T, int kGroups>
SENET_INLINE void moments_strip(const T* column, int64_t c, int64_t begin, int64_t end, bool more, int count,
                                double* total_mean, double* total_squares) {
  using A = Acc<T>;
  const int64_t ahead = pixels_of_block(c * int64_t(sizeof(T))) * c;
  const int64_t probe_end = begin + kProbe < end ? begin + kProbe : end;
  const double before = double(begin), block = double(end - begin), share = block / (before + block);
  const auto at = [&](int64_t p, int k) __attribute__((always_inline)) {
    return load_upto(column + p * c + k * kGroup, k == kGroups - 1 ? count : kGroup);
  };
  Group<A> shift[kGroups], d[kGroups], q[kGroups];
  for (int k = 0; k < kGroups; ++k) shift[k] = d[k] = q[k] = splat<A>(0);
  for (int64_t p = begin; p < probe_end; ++p)
    for (int k = 0; k < kGroups; ++k) shift[k] = shift[k] + at(p, k);
  for (int k = 0; k < kGroups; ++k) shift[k] = shift[k] * splat<A>(A(1) / A(probe_end - begin));
  for (int64_t p = begin; p < end; ++p) {
    for (int k = 0; k < kGroups; ++k) {
      const Group<A> v = at(p, k) - shift[k];
      d[k] = d[k] + v;
      q[k] = fma(v, v, q[k]);
    }
    if (more)
      for (int k = 0; k < kGroups; k += kGroupsOfLine<T>) prefetch(column + p * c + ahead + k * kGroup);
  }
  for (int k = 0; k < kGroups; ++k) {
    A near[kGroup], sum[kGroup], squares[kGroup];
    store(near, shift[k]);
    store(sum, d[k]);
    store(squares, q[k]);
    double *mean = total_mean + k * kGroup, *total = total_squares + k * kGroup;
    for (int j = 0; j < (k == kGroups - 1 ? count : kGroup); ++j) {
      const double inner = sum[j] / block, delta = near[j] + inner - mean[j];
      mean[j] += delta * share;
      total[j] += (squares[j] - sum[j] * inner) + delta * delta * before * share;
    }
  }
}

// scratch: 2 c doubles.
template <class T>
void moments_pixels(const void* x, int64_t c, int64_t m, int64_t c0, int64_t c1, double* mean, Acc<T>* squares,
                    double* scratch) {
  using A = Acc<T>;
  const T* base = static_cast<const T*>(x);
  const int64_t pixels = pixels_of_block(c * int64_t(sizeof(T)));
  double *total_mean = scratch, *total_squares = scratch + c;
  for (int64_t i = c0; i < c1; ++i) total_mean[i] = total_squares[i] = 0;
  for (int64_t begin = 0; begin < m; begin += pixels) {
    const int64_t end = begin + pixels < m ? begin + pixels : m;
    const bool more = end + pixels <= m;
    over_strips(c0, c1, [&](auto strip, int64_t i, int count) __attribute__((always_inline)) {
      moments_strip<T, strip.groups>(base + i, c, begin, end, more, count, total_mean + i, total_squares + i);
    });
  }
  for (int64_t i = c0; i < c1; ++i) {
    mean[i] = total_mean[i] == total_mean[i] ? total_mean[i] : plain_mean(base + i, c, m);
    squares[i] = A(total_squares[i] > 0 || total_squares[i] != total_squares[i] ? total_squares[i] : 0);
  }
}

// ------------------------------------------------------------------------------------------------ gradient sums (T4)

template <class T, bool kMask>
void gradient_moments_planes_impl(const MomentArgs<Acc<T>>& args, int64_t c0, int64_t c1) {
  using A = Acc<T>;
  const int64_t m = args.columns, mask_stride = (m + 7) / 8;
  for (int64_t c = c0; c < c1; ++c) {
    const T* x = static_cast<const T*>(args.x) + c * m;
    const T* dy = static_cast<const T*>(args.dy) + c * m;
    const uint8_t* mask = kMask ? args.mask + c * mask_stride : nullptr;
    const Group<A> mean = splat<A>(args.mean[c]);
    double total0 = 0, total1 = 0;
    for (int64_t begin = 0; begin < m; begin += kBlock) {
      const int64_t end = begin + kBlock < m ? begin + kBlock : m;
      Group<A> s0 = splat<A>(0), s1 = s0, t0 = s0, t1 = s0;
      const auto add = [&](int64_t i, int count, Group<A>& s, Group<A>& t) __attribute__((always_inline)) {
        const Group<A> g = masked_gradient<T, kMask>(dy + i, kMask ? mask + i / 8 : nullptr, nullptr, count);
        s = s + g;
        t = fma(g, load_upto(x + i, count) - mean, t);  // g is zero behind the end
      };
      int64_t i = begin;
      for (; i + 2 * kGroup <= end; i += 2 * kGroup) {
        add(i, kGroup, s0, t0);
        add(i + kGroup, kGroup, s1, t1);
      }
      for (; i < end; i += kGroup) add(i, end - i < kGroup ? int(end - i) : kGroup, s0, t0);
      total0 += sum_of_lanes(s0 + s1);
      total1 += sum_of_lanes(t0 + t1);
    }
    args.sum[c] = A(total0);
    args.centred[c] = A(total1);
  }
}
template <class T>
void gradient_moments_planes(const MomentArgs<Acc<T>>& args, int64_t c0, int64_t c1, double*) {
  choose([&](auto mask) { gradient_moments_planes_impl<T, mask.value>(args, c0, c1); }, args.mask != nullptr);
}

template <class T, bool kMask, int kGroups>
SENET_INLINE void gradient_moments_strip(const MomentArgs<Acc<T>>& args, int64_t i, int64_t begin, int64_t end,
                                         bool more, int count, double* total0, double* total1) {
  using A = Acc<T>;
  const int64_t c = args.columns, mask_stride = (c + 7) / 8, ahead = pixels_of_block(c * int64_t(sizeof(T))) * c;
  const T* x = static_cast<const T*>(args.x) + i;
  const T* dy = static_cast<const T*>(args.dy) + i;
  const uint8_t* mask = kMask ? args.mask + i / 8 : nullptr;
  const auto part = [&](int k) __attribute__((always_inline)) { return k == kGroups - 1 ? count : kGroup; };
  Group<A> mean[kGroups], s[kGroups], t[kGroups];
  for (int k = 0; k < kGroups; ++k) {
    mean[k] = load_upto(args.mean + i + k * kGroup, part(k));
    s[k] = t[k] = splat<A>(0);
  }
  for (int64_t p = begin; p < end; ++p) {
    for (int k = 0; k < kGroups; ++k) {
      const int64_t at = p * c + k * kGroup;
      const uint8_t* bits = kMask ? mask + p * mask_stride + k * (kGroup / 8) : nullptr;
      const Group<A> g = masked_gradient<T, kMask>(dy + at, bits, nullptr, part(k));
      s[k] = s[k] + g;
      t[k] = fma(g, load_upto(x + at, part(k)) - mean[k], t[k]);
    }
    if (more)
      for (int k = 0; k < kGroups; k += kGroupsOfLine<T>) {
        prefetch(dy + p * c + ahead + k * kGroup);
        prefetch(x + p * c + ahead + k * kGroup);
      }
  }
  for (int k = 0; k < kGroups; ++k) {
    A sum[kGroup], centred[kGroup];
    store(sum, s[k]);
    store(centred, t[k]);
    for (int j = 0; j < part(k); ++j) {
      total0[k * kGroup + j] += sum[j];
      total1[k * kGroup + j] += centred[j];
    }
  }
}

template <class T, bool kMask>
void gradient_moments_pixels_impl(const MomentArgs<Acc<T>>& args, int64_t c0, int64_t c1, double* scratch) {
  using A = Acc<T>;
  const int64_t c = args.columns, m = args.rows, pixels = pixels_of_block(c * int64_t(sizeof(T)));
  double *total0 = scratch, *total1 = scratch + c;
  for (int64_t i = c0; i < c1; ++i) total0[i] = total1[i] = 0;
  for (int64_t begin = 0; begin < m; begin += pixels) {
    const int64_t end = begin + pixels < m ? begin + pixels : m;
    const bool more = end + pixels <= m;
    over_strips(c0, c1, [&](auto strip, int64_t i, int count) __attribute__((always_inline)) {
      gradient_moments_strip<T, kMask, strip.groups>(args, i, begin, end, more, count, total0 + i, total1 + i);
    });
  }
  for (int64_t i = c0; i < c1; ++i) {
    args.sum[i] = A(total0[i]);
    args.centred[i] = A(total1[i]);
  }
}
template <class T>
void gradient_moments_pixels(const MomentArgs<Acc<T>>& args, int64_t c0, int64_t c1, double* scratch) {
  choose([&](auto mask) { gradient_moments_pixels_impl<T, mask.value>(args, c0, c1, scratch); }, args.mask != nullptr);
}

}  // namespace SENET_ISA
}  // namespace senet
