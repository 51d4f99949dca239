// The vector helpers: sixteen elements at a time, whatever the instruction set. A Group is 1, 2 or 4 registers wide,
// and every sum over its lanes has the same order on every instruction set.
//
// Compiled once per instruction set, in a namespace of its own. Only C functions are used beside what stands here: an
// inline function of the C++ library would be merged across the three builds, and an old CPU would run the wrong one.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__GNUC__) && !defined(__clang__)
// GCC's own AVX-512 intrinsics start from a variable that they leave undefined on purpose.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#define SENET_INLINE inline __attribute__((always_inline))

namespace senet {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

namespace SENET_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
constexpr int kGroup = 16;

template <class A>
struct Lanes;
template <>
struct Lanes<float> {
  typedef float Vec __attribute__((vector_size(kVectorBytes)));
  typedef float InMemory __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
  typedef int32_t Int __attribute__((vector_size(kVectorBytes)));
  typedef uint32_t Bits __attribute__((vector_size(kVectorBytes)));
  typedef uint16_t Half __attribute__((vector_size(kVectorBytes / 2)));
  typedef uint32_t Word;
};
template <>
struct Lanes<double> {
  typedef double Vec __attribute__((vector_size(kVectorBytes)));
  typedef double InMemory __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));
  typedef int64_t Int __attribute__((vector_size(kVectorBytes)));
  typedef uint64_t Bits __attribute__((vector_size(kVectorBytes)));
  typedef uint64_t Word;
};

template <class A>
struct Group {
  using Element = A;
  using Vec = typename Lanes<A>::Vec;
  static constexpr int kLanes = kVectorBytes / sizeof(A);
  static constexpr int kVecs = kGroup / kLanes;
  Vec v[kVecs];
};

template <class A>
SENET_INLINE Group<A> splat(A value) {
  Group<A> g;
  for (int i = 0; i < Group<A>::kVecs; ++i) g.v[i] = value - typename Group<A>::Vec{};
  return g;
}

#define SENET_BINARY(op)                                                               \
  template <class A>                                                                   \
  SENET_INLINE Group<A> operator op(const Group<A>& a, const Group<A>& b) {            \
    Group<A> g;                                                                        \
    for (int i = 0; i < Group<A>::kVecs; ++i) g.v[i] = a.v[i] op b.v[i];               \
    return g;                                                                          \
  }                                                                                    \
  template <class A>                                                                   \
  SENET_INLINE Group<A> operator op(const Group<A>& a, typename Group<A>::Element b) { \
    return a op splat<A>(b);                                                           \
  }                                                                                    \
  template <class A>                                                                   \
  SENET_INLINE Group<A> operator op(typename Group<A>::Element a, const Group<A>& b) { \
    return splat<A>(a) op b;                                                           \
  }
SENET_BINARY(+)
SENET_BINARY(-)
SENET_BINARY(*)
SENET_BINARY(/)
#undef SENET_BINARY

// a * b + c, in one rounding where the instruction set can.
template <class A>
SENET_INLINE Group<A> fma(const Group<A>& a, const Group<A>& b, const Group<A>& c) {
  Group<A> g;
  for (int i = 0; i < Group<A>::kVecs; ++i) g.v[i] = a.v[i] * b.v[i] + c.v[i];
  return g;
}

// ------------------------------------------------------------------------------------------------ load and store

// Whole registers, not memcpy: GCC copies their bytes in smaller pieces, and a register's load waits for those.
template <class A>
SENET_INLINE Group<A> load_registers(const A* p) {
  Group<A> g;
  for (int i = 0; i < Group<A>::kVecs; ++i)
    g.v[i] = *reinterpret_cast<const typename Lanes<A>::InMemory*>(p + i * Group<A>::kLanes);
  return g;
}
template <class A>
SENET_INLINE void store_registers(A* p, const Group<A>& g) {
  for (int i = 0; i < Group<A>::kVecs; ++i)
    *reinterpret_cast<typename Lanes<A>::InMemory*>(p + i * Group<A>::kLanes) = g.v[i];
}

SENET_INLINE Group<float> load(const float* p) { return load_registers(p); }
SENET_INLINE Group<double> load(const double* p) { return load_registers(p); }
SENET_INLINE Group<float> load(const bfloat16* p) {
  using L = Lanes<float>;
  Group<float> g;
#if defined(__AVX512F__)
  __m256i half;
  memcpy(&half, p, sizeof half);
  g.v[0] = (L::Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16);
  return g;
#elif defined(__AVX2__)
  for (int i = 0; i < 2; ++i) {
    __m128i half;
    memcpy(&half, p + 8 * i, sizeof half);
    g.v[i] = (L::Vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16);
  }
  return g;
#else
  for (int i = 0; i < Group<float>::kVecs; ++i) {
    L::Half half;
    memcpy(&half, p + i * Group<float>::kLanes, sizeof half);
    g.v[i] = (L::Vec)(__builtin_convertvector(half, L::Bits) << 16);
  }
  return g;
#endif
}

SENET_INLINE float widen(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000u) << 16, exponent = (h >> 10) & 31u, fraction = h & 1023u;
  uint32_t bits;
  if (exponent == 31) {
    bits = sign | 0x7f800000u | (fraction << 13);
  } else if (exponent != 0) {
    bits = sign | ((exponent + 112) << 23) | (fraction << 13);
  } else {  // zero or subnormal: fraction * 2^-24
    const float magnitude = float(fraction) * 5.9604644775390625e-8f;
    memcpy(&bits, &magnitude, 4);
    bits |= sign;
  }
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
// Round to nearest, ties to even.
SENET_INLINE uint16_t narrow(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  const uint16_t sign = uint16_t((bits >> 16) & 0x8000u);
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return sign | 0x7e00u;
  if (bits >= 0x477ff000u) return sign | 0x7c00u;  // 65520 and above
  if (bits < 0x38800000u) {                        // below 2^-14: adding 0.5 rounds to a multiple of 2^-24
    float magnitude;
    memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    memcpy(&bits, &magnitude, 4);
    return sign | uint16_t(bits - 0x3f000000u);
  }
  return sign | uint16_t((bits - 0x38000000u + 0xfffu + ((bits >> 13) & 1u)) >> 13);
}

SENET_INLINE Group<float> load(const float16* p) {
  Group<float> g;
#if defined(__AVX512F__)
  __m256i half;
  memcpy(&half, p, sizeof half);
  g.v[0] = (Lanes<float>::Vec)_mm512_cvtph_ps(half);
#elif defined(__F16C__)
  for (int i = 0; i < 2; ++i) {
    __m128i half;
    memcpy(&half, p + 8 * i, sizeof half);
    g.v[i] = (Lanes<float>::Vec)_mm256_cvtph_ps(half);
  }
#else
  float wide[kGroup];
  for (int i = 0; i < kGroup; ++i) wide[i] = widen(p[i].bits);
  g = load(wide);
#endif
  return g;
}

SENET_INLINE void store(float* p, const Group<float>& g) { store_registers(p, g); }
SENET_INLINE void store(double* p, const Group<double>& g) { store_registers(p, g); }
// Rounds to nearest, ties to even. NaNs here come out of arithmetic, so they are quiet and survive truncation.
SENET_INLINE void store(bfloat16* p, const Group<float>& g) {
#if defined(__AVX512BF16__)
  const __m256bh half = _mm512_cvtneps_pbh((__m512)g.v[0]);
  memcpy(p, &half, sizeof half);
#elif defined(__AVX512F__)
  const __m512i bits = (__m512i)g.v[0];
  const __mmask16 number = _mm512_cmp_ps_mask((__m512)g.v[0], (__m512)g.v[0], _CMP_ORD_Q);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i half_unit = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
  const __m512i rounded = _mm512_srli_epi32(_mm512_mask_add_epi32(bits, number, bits, half_unit), 16);
  const __m256i half = _mm512_cvtepi32_epi16(rounded);
  memcpy(p, &half, sizeof half);
#else
  using L = Lanes<float>;
  for (int i = 0; i < Group<float>::kVecs; ++i) {
    const L::Bits bits = (L::Bits)g.v[i], number = (L::Bits)(g.v[i] == g.v[i]);
    const L::Bits rounded = (bits + ((0x7fffu + ((bits >> 16) & 1u)) & number)) >> 16;
#if defined(__AVX2__)
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32((__m256i)rounded, (__m256i)rounded), 0x08);
    memcpy(p + i * Group<float>::kLanes, &words, 16);
#else
    const L::Half half = __builtin_convertvector(rounded, L::Half);
    memcpy(p + i * Group<float>::kLanes, &half, sizeof half);
#endif
  }
#endif
}
SENET_INLINE void store(float16* p, const Group<float>& g) {
#if defined(__AVX512F__)
  const __m256i half = _mm512_cvtps_ph((__m512)g.v[0], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  memcpy(p, &half, sizeof half);
#elif defined(__F16C__)
  for (int i = 0; i < 2; ++i) {
    const __m128i half = _mm256_cvtps_ph((__m256)g.v[i], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    memcpy(p + 8 * i, &half, sizeof half);
  }
#else
  float wide[kGroup];
  store(wide, g);
  for (int i = 0; i < kGroup; ++i) p[i].bits = narrow(wide[i]);
#endif
}

// The first `count` < 16 elements; the other lanes of a load are zero.
template <int kBytes>
SENET_INLINE void copy_part(void* to, const void* from, int count) {
  char* t = static_cast<char*>(to);
  const char* f = static_cast<const char*>(from);
  if (count & 8) memcpy(t, f, 8 * kBytes), t += 8 * kBytes, f += 8 * kBytes;
  if (count & 4) memcpy(t, f, 4 * kBytes), t += 4 * kBytes, f += 4 * kBytes;
  if (count & 2) memcpy(t, f, 2 * kBytes), t += 2 * kBytes, f += 2 * kBytes;
  if (count & 1) memcpy(t, f, kBytes);
}
template <class T>
SENET_INLINE auto load_part(const T* p, int count) {
  T part[kGroup];
  memset(part, 0, sizeof part);
  copy_part<sizeof(T)>(part, p, count);
  return load(part);
}
template <class T, class A>
SENET_INLINE void store_part(T* p, const Group<A>& g, int count) {
  T part[kGroup];
  store(part, g);
  copy_part<sizeof(T)>(p, part, count);
}
#if defined(__AVX512F__)
template <>
SENET_INLINE auto load_part<float>(const float* p, int count) {
  Group<float> g;
  g.v[0] = (Lanes<float>::Vec)_mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), p);
  return g;
}
template <>
SENET_INLINE void store_part<float, float>(float* p, const Group<float>& g, int count) {
  _mm512_mask_storeu_ps(p, __mmask16((1u << count) - 1), (__m512)g.v[0]);
}
#if defined(__AVX512BW__) && defined(__AVX512VL__)
template <>
SENET_INLINE auto load_part<bfloat16>(const bfloat16* p, int count) {
  Group<float> g;
  const __m256i half = _mm256_maskz_loadu_epi16(__mmask16((1u << count) - 1), p);
  g.v[0] = (Lanes<float>::Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16);
  return g;
}
#endif
#endif

// A whole group or the part of one that a row ends with, 0 < count <= 16.
template <class T>
SENET_INLINE auto load_upto(const T* p, int count) {
  return count == kGroup ? load(p) : load_part(p, count);
}
template <class T, class A>
SENET_INLINE void store_upto(T* p, const Group<A>& g, int count) {
  if (count == kGroup)
    store(p, g);
  else
    store_part(p, g, count);
}

SENET_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

// Writes past the caches; p is aligned to 16 elements.
template <class T, class A>
SENET_INLINE void stream(T* p, const Group<A>& g) {
#if defined(__x86_64__)
  alignas(64) T part[kGroup];
  store(part, g);
  char* to = reinterpret_cast<char*>(p);
  const char* from = reinterpret_cast<const char*>(part);
#if defined(__AVX512F__)
  if (sizeof part >= 64) {
    for (size_t i = 0; i < sizeof part; i += 64)
      _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i), _mm512_load_si512(from + i));
    return;
  }
#endif
#if defined(__AVX2__)
  for (size_t i = 0; i < sizeof part; i += 32)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i),
                        _mm256_load_si256(reinterpret_cast<const __m256i*>(from + i)));
#else
  for (size_t i = 0; i < sizeof part; i += 16)
    _mm_stream_si128(reinterpret_cast<__m128i*>(to + i), _mm_load_si128(reinterpret_cast<const __m128i*>(from + i)));
#endif
#else
  store(p, g);
#endif
}
SENET_INLINE void end_of_stream() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// ------------------------------------------------------------------------------------------------ lanes

// ((l0 + l8) + (l4 + l12)) + ...: halves are added to each other until one lane is left.
template <class A>
SENET_INLINE A sum_of_lanes(const Group<A>& g) {
  A lane[kGroup];
  store(lane, g);
  for (int half = kGroup / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
  return lane[0];
}
#if defined(__x86_64__)
template <>
SENET_INLINE float sum_of_lanes<float>(const Group<float>& g) {
#if defined(__AVX512F__)
  const __m512 all = (__m512)g.v[0];
  const __m256 upper = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(all), 1));
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(all), upper);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
#elif defined(__AVX2__)
  const __m256 eight = _mm256_add_ps((__m256)g.v[0], (__m256)g.v[1]);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
#else
  const __m128 four = (__m128)((g.v[0] + g.v[2]) + (g.v[1] + g.v[3]));
#endif
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}
#endif

template <class A>
SENET_INLINE typename Lanes<A>::Bits lane_bits(int vec) {
  typename Lanes<A>::Bits bits;
  for (int i = 0; i < Group<A>::kLanes; ++i) bits[i] = typename Lanes<A>::Word(1) << (vec * Group<A>::kLanes + i);
  return bits;
}

// Bit i: lane i is not <= 0, so NaN passes (torch's threshold_backward).
template <class A>
SENET_INLINE uint16_t positive_lanes(const Group<A>& g) {
  uint32_t bits = 0;
#if defined(__AVX512F__)
  if (sizeof(A) == 4) return _mm512_cmp_ps_mask((__m512)g.v[0], _mm512_setzero_ps(), _CMP_NLE_UQ);
#endif
#if defined(__AVX2__)
  if (sizeof(A) == 4) {
    for (int i = 0; i < Group<A>::kVecs; ++i) {
      __m256 v;
      memcpy(&v, &g.v[i], sizeof v);
      bits |= uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(v, _mm256_setzero_ps(), _CMP_NLE_UQ)))
              << (i * Group<A>::kLanes);
    }
    return uint16_t(bits);
  }
#elif defined(__x86_64__)
  if (sizeof(A) == 4) {
    for (int i = 0; i < Group<A>::kVecs; ++i)
      bits |= uint32_t(_mm_movemask_ps(_mm_cmpnle_ps((__m128)g.v[i], _mm_setzero_ps()))) << (i * Group<A>::kLanes);
    return uint16_t(bits);
  }
#endif
  A lane[kGroup];
  store(lane, g);
  for (int i = 0; i < kGroup; ++i) bits |= uint32_t(!(lane[i] <= 0)) << i;
  return uint16_t(bits);
}

// Lanes whose bit is clear become zero.
template <class A>
SENET_INLINE Group<A> keep_lanes(const Group<A>& g, uint16_t bits) {
  using L = Lanes<A>;
  Group<A> out;
  for (int i = 0; i < Group<A>::kVecs; ++i) {
    const typename L::Bits wanted = lane_bits<A>(i);
    const typename L::Bits present = (typename L::Word(bits) - typename L::Bits{}) & wanted;
    out.v[i] = (typename L::Vec)((typename L::Bits)g.v[i] & (typename L::Bits)(present == wanted));
  }
  return out;
}

// max(v, 0), NaN stays NaN.
template <class A>
SENET_INLINE Group<A> relu(const Group<A>& g) {
  Group<A> out;
  for (int i = 0; i < Group<A>::kVecs; ++i)
    out.v[i] = (typename Lanes<A>::Vec)((typename Lanes<A>::Int)g.v[i] & ~(g.v[i] <= typename Lanes<A>::Vec{}));
  return out;
}

// yes where a == b, else no.
template <class A>
SENET_INLINE Group<A> where_equal(const Group<A>& a, const Group<A>& b, const Group<A>& yes, const Group<A>& no) {
  Group<A> out;
  for (int i = 0; i < Group<A>::kVecs; ++i) out.v[i] = a.v[i] == b.v[i] ? yes.v[i] : no.v[i];
  return out;
}

template <class A>
struct Mask {  // of a comparison, each lane all ones or zero
  typename Lanes<A>::Int v[Group<A>::kVecs];
};

#define SENET_COMPARISON(op)                                                                          \
  template <class A>                                                                                  \
  SENET_INLINE Mask<A> operator op(const Group<A>& a, const Group<A>& b) {                            \
    Mask<A> mask;                                                                                     \
    for (int i = 0; i < Group<A>::kVecs; ++i) mask.v[i] = (typename Lanes<A>::Int)(a.v[i] op b.v[i]); \
    return mask;                                                                                      \
  }
SENET_COMPARISON(<)
SENET_COMPARISON(<=)
#undef SENET_COMPARISON

template <class A>
SENET_INLINE Group<A> where(const Mask<A>& mask, const Group<A>& yes, const Group<A>& no) {
  Group<A> out;
  for (int i = 0; i < Group<A>::kVecs; ++i) out.v[i] = mask.v[i] ? yes.v[i] : no.v[i];
  return out;
}

// NaN stays NaN.
template <class A>
SENET_INLINE Group<A> min(const Group<A>& g, typename Group<A>::Element limit) {
  return where(splat<A>(limit) < g, splat<A>(limit), g);
}

// The magnitude, and the sign, of one group each.
template <class A>
SENET_INLINE Group<A> copysign(const Group<A>& magnitude, const Group<A>& sign) {
  using Bits = typename Lanes<A>::Bits;
  constexpr typename Lanes<A>::Word kSign = typename Lanes<A>::Word(1) << (8 * sizeof(A) - 1);
  Group<A> out;
  for (int i = 0; i < Group<A>::kVecs; ++i)
    out.v[i] = (typename Lanes<A>::Vec)(((Bits)magnitude.v[i] & ~kSign) | ((Bits)sign.v[i] & kSign));
  return out;
}
template <class A>
SENET_INLINE Group<A> abs(const Group<A>& g) {
  return copysign(g, splat(A(0)));
}

// The running maximum and how many elements attain it; a NaN takes over and stays.
template <class A>
SENET_INLINE void update_peak(Group<A>& peak, Group<A>& ties, const Group<A>& x) {
  using L = Lanes<A>;
  using Int = typename L::Int;
  using Vec = typename L::Vec;
  for (int i = 0; i < Group<A>::kVecs; ++i) {
    const Int higher = (Int)(x.v[i] > peak.v[i]) | (Int)(x.v[i] != x.v[i]);
    const Int equal = (Int)(x.v[i] == peak.v[i]);
    const Vec one = A(1) - Vec{};
    ties.v[i] = (Vec)(((Int)one & higher) | ((Int)(ties.v[i] + (Vec)((Int)one & equal)) & ~higher));
    peak.v[i] = (Vec)(((Int)x.v[i] & higher) | ((Int)peak.v[i] & ~higher));
  }
}

}  // namespace SENET_ISA
}  // namespace senet
