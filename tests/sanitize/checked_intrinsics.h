// Included ahead of every file of the sanitizer's build (-include).
//
// gcc instruments ordinary loads and stores, but not what a masked or a streaming instruction touches, and
// tails and large outputs are written with those. Here each one first has its bytes looked up in
// AddressSanitizer's map. run.sh fails when csrc/ uses one that has no entry.
#pragma once
#if defined(__x86_64__)
#include <immintrin.h>
#include <sanitizer/asan_interface.h>
#include <stddef.h>

namespace senet_checked {

// A poisoned byte is then touched by an ordinary instruction, for the ordinary report.
static inline void reads(const void* at, size_t bytes) {
  if (void* bad = __asan_region_is_poisoned(const_cast<void*>(at), bytes)) (void)*static_cast<volatile char*>(bad);
}
static inline void writes(void* at, size_t bytes) {
  if (void* bad = __asan_region_is_poisoned(at, bytes)) *static_cast<volatile char*>(bad) = 0;
}
static inline void reads_lanes(const void* at, unsigned long long mask, size_t bytes) {
  for (size_t lane = 0; mask >> lane; ++lane)
    if (mask >> lane & 1) reads(static_cast<const char*>(at) + lane * bytes, bytes);
}
static inline void writes_lanes(void* at, unsigned long long mask, size_t bytes) {
  for (size_t lane = 0; mask >> lane; ++lane)
    if (mask >> lane & 1) writes(static_cast<char*>(at) + lane * bytes, bytes);
}

}  // namespace senet_checked

#define _mm512_maskz_loadu_ps(mask, p) (senet_checked::reads_lanes(p, mask, 4), _mm512_maskz_loadu_ps(mask, p))
#define _mm512_maskz_loadu_pd(mask, p) (senet_checked::reads_lanes(p, mask, 8), _mm512_maskz_loadu_pd(mask, p))
#define _mm256_maskz_loadu_epi16(mask, p) (senet_checked::reads_lanes(p, mask, 2), _mm256_maskz_loadu_epi16(mask, p))
#define _mm512_mask_storeu_ps(p, mask, v) (senet_checked::writes_lanes(p, mask, 4), _mm512_mask_storeu_ps(p, mask, v))
#define _mm512_mask_storeu_pd(p, mask, v) (senet_checked::writes_lanes(p, mask, 8), _mm512_mask_storeu_pd(p, mask, v))
#define _mm256_mask_storeu_epi16(p, mask, v) \
  (senet_checked::writes_lanes(p, mask, 2), _mm256_mask_storeu_epi16(p, mask, v))
#define _mm_stream_si128(p, v) (senet_checked::writes(p, 16), _mm_stream_si128(p, v))
#define _mm256_stream_si256(p, v) (senet_checked::writes(p, 32), _mm256_stream_si256(p, v))
#define _mm512_stream_si512(p, v) (senet_checked::writes(p, 64), _mm512_stream_si512(p, v))
#endif
