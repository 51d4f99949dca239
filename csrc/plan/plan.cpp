#include "plan.h"

#include <algorithm>

namespace senet {
namespace {

// Below this many bytes of tensor traffic a second thread costs more than it does (a barrier is 2-5 us, which is
// what one core needs for about 64 KiB).
constexpr int64_t kSerialBytes = 64 * 1024;

// Sharing the stages saves (threads - 1) reads of the weights for about four barriers; from L3 that is worth it from
// here on.
constexpr int64_t kPhaseWeightBytes = 1024 * 1024;

// An output of more than this part of the L3 is large.
constexpr int64_t kLargeOutput = 4;

// Beyond this malloc maps fresh pages for every output (M_MMAP_THRESHOLD's maximum in glibc): the kernel has just
// zeroed a page when it is first written, so its lines are in a cache, and streaming past them writes memory twice.
constexpr int64_t kFreshPages = 32 * 1024 * 1024;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The next layer would not find much of a large output in the L3; reading it before it is written, and pushing x out of
// the cache for it, costs more.
bool is_streamed(int64_t output, const CpuFacts& facts) {
  return kLargeOutput * output > facts.l3_bytes && output < kFreshPages;
}

}  // namespace

CpuPlan plan_cpu(const Problem& p, const CpuFacts& facts) {
  const int64_t threads = std::max<int64_t>(1, facts.threads);
  const int64_t tensor = p.c * p.m * p.element_size;
  // What the second sweep finds in a cache: x forward, x and dy backward.
  const int64_t sample = tensor * (p.backward ? 2 : 1);
  const int64_t weights = 2 * p.c * p.r * p.weight_size;

  CpuPlan plan{};
  plan.samples_at_a_time = 1;
  plan.pieces_per_sample = 1;
  plan.stream_stores = is_streamed(p.n * tensor, facts);

  // As few samples at a time as make reading the weights cheap beside them, and no more than stay near.
  const int64_t per_thread = std::max<int64_t>(1, ceil_div(p.n, threads));
  const int64_t near = facts.l2_bytes / 2 + facts.l3_bytes / (2 * threads);
  const int64_t fitting = std::clamp<int64_t>(near / sample, 1, per_thread);
  plan.samples_at_a_time = std::clamp<int64_t>(ceil_div(weights, sample), 1, fitting);
  if (threads == 1 || p.n == 0 || p.n * sample + weights <= kSerialBytes) {
    plan.strategy = CpuStrategy::serial;
    plan.reason = threads == 1 ? "one thread" : "too little work to wake a second thread";
    return plan;
  }
  if (p.n < threads) {
    plan.strategy = CpuStrategy::phases;
    plan.pieces_per_sample = ceil_div(threads, p.n);
    plan.reason = "fewer samples than threads";
    return plan;
  }
  const bool resident = p.n * sample <= threads * facts.l2_bytes + facts.l3_bytes / 2;
  if (resident && (threads - 1) * weights >= kPhaseWeightBytes) {
    plan.strategy = CpuStrategy::phases;
    plan.reason = "the batch stays in the caches, and the weights are too large for each thread to read them all";
    return plan;
  }
  plan.strategy = CpuStrategy::samples;
  plan.reason = "each thread keeps its samples in its caches between the two sweeps";
  return plan;
}

CpuPlan plan_cpu_tail(const Problem& p, const CpuFacts& facts) {
  const int64_t threads = std::max<int64_t>(1, facts.threads);
  const int64_t tensor = p.n * p.c * p.m * p.element_size;
  CpuPlan plan{};
  plan.samples_at_a_time = 1;
  plan.pieces_per_sample = 1;
  plan.stream_stores = is_streamed(tensor, facts);
  if (threads == 1 || tensor * (p.backward ? 2 : 1) <= kSerialBytes) {
    plan.strategy = CpuStrategy::serial;
    plan.reason = threads == 1 ? "one thread" : "too little work to wake a second thread";
    return plan;
  }
  plan.strategy = CpuStrategy::phases;
  if (p.n < threads) plan.pieces_per_sample = ceil_div(threads, p.n);
  plan.reason = "statistics of the batch stand between the two sweeps";
  return plan;
}

const char* name(CpuStrategy strategy) {
  switch (strategy) {
    case CpuStrategy::serial:
      return "serial";
    case CpuStrategy::samples:
      return "samples";
    case CpuStrategy::phases:
      return "phases";
  }
  return "?";
}

}  // namespace senet
