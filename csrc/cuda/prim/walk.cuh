// Loops that keep several loads under way per thread.
#pragma once
#include <cstdint>

#include "pack.cuh"

namespace senet::cuda {

// use(i, load(i)) for i = first, first + step, ... below end; kAtOnce of them are loaded before the first is used.
template <int kAtOnce, class Load, class Use>
__device__ __forceinline__ void in_flight(int first, int end, int step, Load load, Use use) {
  for (int i = first; i < end; i += kAtOnce * step) {
    decltype(load(i)) loaded[kAtOnce];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u)
      if (i + u * step < end) loaded[u] = load(i + u * step);
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u)
      if (i + u * step < end) use(i + u * step, loaded[u]);
  }
}

// A range [begin, end) of contiguous elements, shared by `lanes` threads, in packs that lie at multiples of 8 elements.
// Whole ones, where 16-byte accesses are allowed (wide), go through load_whole(i), several at once; what is left, the
// range's ends or everything, through load_part(i, lo, hi), where [lo, hi) are the pack's elements in the range. Both
// give the same type, and use(i, lo, hi, loaded) is called for all.
template <int kAtOnce, class LoadWhole, class LoadPart, class Use>
__device__ __forceinline__ void over_packs(int begin, int end, int lane, int lanes, bool wide, LoadWhole load_whole,
                                           LoadPart load_part, Use use) {
  const int first = begin / kPack, last = begin < end ? (end + kPack - 1) / kPack : first;
  const int whole = wide ? (begin + kPack - 1) / kPack : last, whole_end = wide ? end / kPack : last;
  in_flight<kAtOnce>(whole + lane, whole_end, lanes, load_whole,
                     [&](int i, const auto& loaded) { use(i, 0, kPack, loaded); });
  // At most one pack in front of the whole ones and one behind them, if there is a whole one.
  const int before = whole < last ? whole - first : last - first;
  const int behind = whole_end >= whole && whole_end < last ? 1 : 0;
  for (int e = lane; e < before + behind; e += lanes) {
    const int i = e < before ? first + e : whole_end;
    const int lo = max(begin - i * kPack, 0), hi = min(end - i * kPack, kPack);
    use(i, lo, hi, load_part(i, lo, hi));
  }
}

}  // namespace senet::cuda
