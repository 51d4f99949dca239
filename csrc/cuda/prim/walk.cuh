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
// Whole ones are loaded by load_whole(i), several at once, where 16-byte accesses are allowed (wide); the range's ends,
// and everything where they are not, by load_part(i, lo, hi), where [lo, hi) are the pack's elements in the range. Both
// give the same type, and use(i, lo, hi, loaded) is called for all: by the same thread in the same order, wide or not.
template <int kAtOnce, class LoadWhole, class LoadPart, class Use>
__device__ __forceinline__ void over_packs(int begin, int end, int lane, int lanes, bool wide, LoadWhole load_whole,
                                           LoadPart load_part, Use use) {
  const int first = begin / kPack, last = begin < end ? (end + kPack - 1) / kPack : first;
  const int whole = (begin + kPack - 1) / kPack, whole_end = end / kPack;
  const int mine = first + lane < whole ? first + lane + lanes : first + lane;
  const auto use_whole = [&](int i, const auto& loaded) { use(i, 0, kPack, loaded); };
  if (wide)
    in_flight<kAtOnce>(mine, whole_end, lanes, load_whole, use_whole);
  else
    in_flight<1>(mine, whole_end, lanes, [&](int i) { return load_part(i, 0, kPack); }, use_whole);
  // A part of a pack in front of the whole ones, and one behind them; or one pack that is all.
#pragma unroll 1
  for (int e = 0; e < 2; ++e) {
    const int i = e == 0 ? first : last - 1;
    const bool is_part = e == 0 ? first < whole : last > whole_end && last - 1 >= whole;
    if (!is_part || first == last || (i - first) % lanes != lane) continue;
    const int lo = max(begin - i * kPack, 0), hi = min(end - i * kPack, kPack);
    use(i, lo, hi, load_part(i, lo, hi));
  }
}

}  // namespace senet::cuda
