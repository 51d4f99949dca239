// Bit masks: least significant bit first, each line of the tensor (a plane, or a pixel's channels) padded to a byte.
#pragma once
#include <cstdint>

#include "port.cuh"

namespace senet::cuda {

__device__ __forceinline__ uint32_t low_bits(int count) { return (1u << count) - 1u; }

// `count` bits, 1 to 8, from bit `at` on. Reads no byte that holds none of them.
__device__ __forceinline__ uint32_t bits_at(const uint8_t* bytes, int64_t at, int count) {
  const int shift = static_cast<int>(at % 8);
  uint32_t bits = static_cast<uint32_t>(bytes[at / 8]) >> shift;
  if (shift + count > 8) bits |= static_cast<uint32_t>(bytes[at / 8 + 1]) << (8 - shift);
  return bits & low_bits(count);
}

// `count` bits, 1 to 8, of consecutive elements of planes of m, from position `p` of the first plane on.
// lines: the first plane's bytes, ceil(m / 8) to a plane.
__device__ __forceinline__ uint32_t plane_bits(const uint8_t* lines, int p, int count, int m) {
  if (p + count <= m) return bits_at(lines, p, count);
  const int line = (m + 7) / 8;
  uint32_t bits = 0;
  for (int done = 0; done < count;) {
    const int here = min(count - done, m - p);
    bits |= bits_at(lines, p, here) << done;
    done += here;
    p = 0;
    lines += line;
  }
  return bits;
}

}  // namespace senet::cuda
