// What to launch is decided here, by pure functions of sizes and machine facts. No torch, no CUDA.
#pragma once
#include <cstdint>

namespace senet {

// Elementwise functions; the numbers are those of senet_fused/activations.py.
enum class Function : int64_t {
  identity,
  relu,
  relu6,
  leaky_relu,
  silu,
  gelu,
  gelu_tanh,
  hardswish,
  mish,
  tanh,
  sigmoid,
  hardsigmoid,
};
constexpr int64_t kFunctions = 12;

// senet_fused/reference.py, SQUEEZES.
enum class Squeeze : int64_t { avg, max, avgmax };
constexpr int64_t kSqueezes = 3;

// One SE layer's call: x is [n, c, m], the bottleneck r wide.
struct Problem {
  int64_t n, c, r, m;
  int64_t element_size;  // bytes of one element of x
  int64_t weight_size;   // bytes of one weight
  bool channels_last;
  bool backward;
};

struct CpuFacts {
  int64_t threads;
  int64_t l2_bytes;  // of one core
  int64_t l3_bytes;  // shared
};

enum class CpuStrategy {
  serial,   // one thread does everything: waking the others costs more than the work
  samples,  // each thread takes whole samples through all stages, a few at a time
  phases,   // all threads share each stage, with a barrier between stages
};

struct CpuPlan {
  CpuStrategy strategy;
  int64_t samples_at_a_time;  // samples: how many share one read of the weights
  int64_t pieces_per_sample;  // phases: into how many parts one sample is cut
  bool stream_stores;         // write the large output past the caches
  const char* reason;
};

CpuPlan plan_cpu(const Problem& problem, const CpuFacts& facts);
// Of a block tail, whose r is 0 without a gate: serial or phases.
CpuPlan plan_cpu_tail(const Problem& problem, const CpuFacts& facts);
const char* name(CpuStrategy strategy);

}  // namespace senet
