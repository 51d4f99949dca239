// Faults for the sanitizer run to find, before it is believed when it finds none.
#include <cstdint>

extern "C" void write_past_the_end(float* data, std::int64_t count) { data[count] = 1.0f; }

// Ends 4 bytes behind the data, by an instruction that only checked_intrinsics.h looks at.
extern "C" void stream_past_the_end(float* data, std::int64_t count) {
#if defined(__x86_64__)
  _mm_stream_si128(reinterpret_cast<__m128i*>(data + count - 3), _mm_setzero_si128());
#else
  data[count] = 0.0f;
#endif
}

extern "C" void overflow(float*, std::int64_t count) {
  volatile int sum = static_cast<int>(count);
  sum = sum + 0x7fffffff;
}
