// Division by a number that is known before the launch: a multiplication and a shift.
#pragma once
#include <cstdint>

#include "port.cuh"

namespace senet::cuda {

// For 0 <= n < 2^31 and 1 <= d < 2^31 (Granlund and Montgomery 1994, theorem 4.2, with 31 bits): n / d is the upper
// part of n * ceil(2^(31 + l) / d), where 2^l is the least power of two that is at least d.
struct Divisor {
  uint32_t divisor, factor, shift;

  static Divisor of(int64_t d) {
    uint32_t l = 0;
    while ((int64_t{1} << l) < d) ++l;
    if (l == 0) return {1, 0, 0};
    const uint64_t power = uint64_t{1} << (31 + l);
    return {static_cast<uint32_t>(d), static_cast<uint32_t>((power + d - 1) / d), l - 1};
  }

  __device__ __forceinline__ uint32_t divide(uint32_t n) const {
    return divisor == 1 ? n : __umulhi(n, factor) >> shift;
  }
};

}  // namespace senet::cuda
