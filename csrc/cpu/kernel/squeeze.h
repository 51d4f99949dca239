// First sweeps: (E1) forward, (B1) and (B2) backward. Sums run in a fixed order that depends on the sizes of one sample
// alone: groups of four along a plane, blocks of kBlock groups; blocks of kPixels pixels in channels_last.
#pragma once
#include "../kernels.h"
#include "../vec.h"

namespace senet {
namespace SENET_ISA {

// A block of a plane is summed by itself and then added to the total, so that rounding errors do not grow with m. Many
// blocks are summed in parts of about their square root, for the same reason.
constexpr int64_t kBlock = 64 * kGroup;
constexpr int64_t kPixels = 32;
constexpr int64_t kBytesAhead = 4096;

template <class T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};
template <class T>
using Acc = typename Accumulator<T>::type;

// Calls f with a Yes or a No for each flag: what a call decides once is a constant in its loops.
struct Yes {
  static constexpr bool value = true;
};
struct No {
  static constexpr bool value = false;
};
template <class F>
SENET_INLINE void choose(const F& f) {
  f();
}
template <class F, class... Flags>
SENET_INLINE void choose(const F& f, bool flag, Flags... flags) {
  if (flag)
    choose([&f](auto... chosen) __attribute__((always_inline)) { f(Yes(), chosen...); }, flags...);
  else
    choose([&f](auto... chosen) __attribute__((always_inline)) { f(No(), chosen...); }, flags...);
}

// How many blocks make a part of their sum.
SENET_INLINE int64_t blocks_of_part(int64_t blocks) {
  if (blocks <= 128) return blocks;
  int64_t part = 64;
  while (part * part < blocks) part *= 2;
  return part;
}

// Adds term(i, count) for the groups of [0, m): count is 16 but for the last, shorter one.
template <class A, class Term>
SENET_INLINE A sum_of_groups(int64_t m, const Term& term) {
  const int64_t part_end = blocks_of_part((m + kBlock - 1) / kBlock) * kBlock;
  Group<A> total = splat<A>(0), part = total;
  for (int64_t begin = 0; begin < m; begin += kBlock) {
    const int64_t end = begin + kBlock < m ? begin + kBlock : m;
    Group<A> s0 = splat<A>(0), s1 = s0, s2 = s0, s3 = s0;
    int64_t i = begin;
    for (; i + 4 * kGroup <= end; i += 4 * kGroup) {
      s0 = term(i, kGroup, s0);
      s1 = term(i + kGroup, kGroup, s1);
      s2 = term(i + 2 * kGroup, kGroup, s2);
      s3 = term(i + 3 * kGroup, kGroup, s3);
    }
    for (; i + kGroup <= end; i += kGroup) s0 = term(i, kGroup, s0);
    if (i < end) s1 = term(i, int(end - i), s1);
    part = part + ((s0 + s1) + (s2 + s3));
    if (end == m || end % part_end == 0) {
      total = total + part;
      part = splat<A>(0);
    }
  }
  return sum_of_lanes(total);
}

template <class T>
void sum_planes(const void* x, int64_t m, int64_t c0, int64_t c1, Acc<T>* sum) {
  using A = Acc<T>;
  for (int64_t c = c0; c < c1; ++c) {
    const T* plane = static_cast<const T*>(x) + c * m;
    sum[c] = sum_of_groups<A>(m, [plane](int64_t i, int count, const Group<A>& s)
                                     __attribute__((always_inline)) { return s + load_upto(plane + i, count); });
  }
}

// Adds term(p, i, count), summed over the pixels of a block, to sum[i]. ahead(p, i) asks for what term will read: the
// hardware's prefetchers do not follow four short rows at once (without it 8 GB/s a core, with it 20).
template <class A, class Term, class Ahead>
SENET_INLINE void sum_of_pixels(int64_t c, int64_t m, int64_t c0, int64_t c1, int64_t row_bytes, A* sum, A* scratch,
                                const Term& term, const Ahead& ahead) {
  const int64_t rows_ahead = kBytesAhead / row_bytes / 4 * 4 + 4;
  const int64_t part_end = blocks_of_part((m + kPixels - 1) / kPixels) * kPixels;
  A* part = part_end < m ? scratch + c : sum;
  for (int64_t i = c0; i < c1; ++i) sum[i] = part[i] = 0;
  for (int64_t begin = 0; begin < m; begin += kPixels) {
    const int64_t end = begin + kPixels < m ? begin + kPixels : m;
    int64_t p = begin;
    for (; p < end; p += 4) {
      const int64_t left = end - p;
      const bool first = p == begin, last = left <= 4;
      for (int64_t i = c0; i < c1; i += kGroup) {
        const int count = c1 - i < kGroup ? int(c1 - i) : kGroup;
        if (p + rows_ahead + 4 <= m)
          for (int64_t q = 0; q < 4; ++q) ahead(p + rows_ahead + q, i);
        Group<A> s;
        if (left >= 4)
          s = (term(p, i, count) + term(p + 1, i, count)) + (term(p + 2, i, count) + term(p + 3, i, count));
        else {
          s = term(p, i, count);
          for (int64_t q = 1; q < left; ++q) s = s + term(p + q, i, count);
        }
        if (!first) s = load_upto(scratch + i, count) + s;
        A* to = scratch;
        if (last) {
          s = load_upto(part + i, count) + s;
          to = part;
        }
        store_upto(to + i, s, count);
      }
    }
    if (part != sum && (end == m || end % part_end == 0))
      for (int64_t i = c0; i < c1; ++i) {
        sum[i] += part[i];
        part[i] = 0;
      }
  }
}

template <class T>
void sum_pixels(const void* x, int64_t c, int64_t m, int64_t c0, int64_t c1, Acc<T>* sum, Acc<T>* scratch) {
  const T* base = static_cast<const T*>(x);
  sum_of_pixels<Acc<T>>(
      c, m, c0, c1, c * int64_t(sizeof(T)), sum, scratch,
      [base, c](int64_t p, int64_t i, int count)
          __attribute__((always_inline)) { return load_upto(base + p * c + i, count); },
      [base, c](int64_t p, int64_t i) __attribute__((always_inline)) { prefetch(base + p * c + i); });
}

template <class T>
void peak_planes(const void* x, int64_t m, int64_t c0, int64_t c1, Acc<T>* peak, Acc<T>* ties) {
  using A = Acc<T>;
  for (int64_t c = c0; c < c1; ++c) {
    const T* plane = static_cast<const T*>(x) + c * m;
    Group<A> top = splat<A>(-__builtin_inf()), count = splat<A>(0);
    int64_t i = 0;
    for (; i + kGroup <= m; i += kGroup) update_peak(top, count, load(plane + i));
    A tops[kGroup + kGroup], counts[kGroup + kGroup];
    store(tops, top);
    store(counts, count);
    store(tops + kGroup, load_part(plane + i, int(m - i)));
    for (int64_t k = 0; k < m - i; ++k) counts[kGroup + k] = 1;
    A best = -__builtin_inf(), attained = 0;
    for (int64_t k = 0; k < kGroup + (m - i); ++k) {
      if (tops[k] > best || tops[k] != tops[k]) {
        best = tops[k];
        attained = counts[k];
      } else if (tops[k] == best) {
        attained += counts[k];
      }
      if (best != best) break;
    }
    peak[c] = best;
    ties[c] = best == best ? attained : A(0);  // as torch.amax: nothing equals NaN
  }
}

template <class T>
void peak_pixels(const void* x, int64_t c, int64_t m, int64_t c0, int64_t c1, Acc<T>* peak, Acc<T>* ties) {
  using A = Acc<T>;
  const T* base = static_cast<const T*>(x);
  for (int64_t i = c0; i < c1; i += kGroup) {
    const int count = c1 - i < kGroup ? int(c1 - i) : kGroup;
    Group<A> top = splat<A>(-__builtin_inf()), attained = splat<A>(0);
    for (int64_t p = 0; p < m; ++p) {
      const T* at = base + p * c + i;
      update_peak(top, attained, load_upto(at, count));
    }
    A tops[kGroup], counts[kGroup];
    store(tops, top);
    store(counts, attained);
    for (int k = 0; k < count; ++k) {
      peak[i + k] = tops[k];
      ties[i + k] = tops[k] == tops[k] ? counts[k] : A(0);
    }
  }
}

// g of (B1) at one group of a row, kept in dresidual where that is wanted.
template <class T, bool kMask>
SENET_INLINE Group<Acc<T>> masked_gradient(const T* dy, const uint8_t* mask, T* dresidual, int count) {
  Group<Acc<T>> g = load_upto(dy, count);
  if (!kMask) return g;
  const uint16_t bits = uint16_t(mask[0] | (count > 8 ? mask[1] << 8 : 0));
  g = keep_lanes(g, bits);
  if (dresidual != nullptr) {
    store_upto(dresidual, g, count);
  }
  return g;
}

template <class T, bool kMask>
void dot_planes_impl(const DotArgs<Acc<T>>& args, int64_t c0, int64_t c1, Acc<T>* sum) {
  using A = Acc<T>;
  const int64_t m = args.columns, mask_stride = (m + 7) / 8;
  for (int64_t c = c0; c < c1; ++c) {
    const T* x = static_cast<const T*>(args.x) + c * m;
    const T* dy = static_cast<const T*>(args.dy) + c * m;
    const uint8_t* mask = kMask ? args.mask + c * mask_stride : nullptr;
    T* out = kMask && args.dresidual != nullptr ? static_cast<T*>(args.dresidual) + c * m : nullptr;
    sum[c] = sum_of_groups<A>(m, [=](int64_t i, int count, const Group<A>& s) __attribute__((always_inline)) {
      const Group<A> g =
          masked_gradient<T, kMask>(dy + i, kMask ? mask + i / 8 : nullptr, out != nullptr ? out + i : nullptr, count);
      return fma(g, load_upto(x + i, count), s);
    });
  }
}
template <class T>
void dot_planes(const DotArgs<Acc<T>>& args, int64_t c0, int64_t c1, Acc<T>* sum) {
  choose([&](auto mask) { dot_planes_impl<T, mask.value>(args, c0, c1, sum); }, args.mask != nullptr);
}

template <class T, bool kMask>
void dot_pixels_impl(const DotArgs<Acc<T>>& args, int64_t c0, int64_t c1, Acc<T>* sum, Acc<T>* scratch) {
  using A = Acc<T>;
  const int64_t c = args.columns, mask_stride = (c + 7) / 8;
  const T* x = static_cast<const T*>(args.x);
  const T* dy = static_cast<const T*>(args.dy);
  T* out = static_cast<T*>(args.dresidual);
  const uint8_t* mask = args.mask;
  sum_of_pixels<A>(
      c, args.rows, c0, c1, c * int64_t(sizeof(T)), sum, scratch,
      [=](int64_t p, int64_t i, int count) __attribute__((always_inline)) {
        const int64_t at = p * c + i;
        const Group<A> g = masked_gradient<T, kMask>(dy + at, kMask ? mask + p * mask_stride + i / 8 : nullptr,
                                                     kMask && out != nullptr ? out + at : nullptr, count);
        return g * load_upto(x + at, count);
      },
      [=](int64_t p, int64_t i) __attribute__((always_inline)) {
        prefetch(dy + p * c + i);
        prefetch(x + p * c + i);
      });
}
template <class T>
void dot_pixels(const DotArgs<Acc<T>>& args, int64_t c0, int64_t c1, Acc<T>* sum, Acc<T>* scratch) {
  choose([&](auto mask) { dot_pixels_impl<T, mask.value>(args, c0, c1, sum, scratch); }, args.mask != nullptr);
}

}  // namespace SENET_ISA
}  // namespace senet
