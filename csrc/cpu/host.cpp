#include "host.h"

#include <torch/csrc/stable/ops.h>

#include <cstdlib>
#include <cstring>
#include <fstream>
#include <string>

namespace senet {
namespace {

// The fastest table that this CPU can run; SENET_FUSED_ISA names a slower one.
const Kernels& choose_kernels() {
  const char* wanted = std::getenv("SENET_FUSED_ISA");
  if (wanted != nullptr && *wanted == '\0') wanted = nullptr;
  const auto is = [wanted](const char* name) { return wanted == nullptr || std::strcmp(wanted, name) == 0; };
#if defined(SENET_X86_DISPATCH)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");  // and so F16C
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  // Rounding to bfloat16 is then one instruction instead of six: half of the second sweep's time.
  if (avx512 && __builtin_cpu_supports("avx512bf16") && is("avx512_bf16")) return avx512_bf16::kernels();
  if (avx512 && is("avx512")) return avx512::kernels();
  if (avx2 && is("avx2")) return avx2::kernels();
  constexpr const char* kKnown = "baseline, avx2, avx512 or avx512_bf16, as far as this CPU has it";
#else
  constexpr const char* kKnown = "baseline (this build has no other)";
#endif
  STD_TORCH_CHECK(is("baseline"), "senet_fused: SENET_FUSED_ISA must be ", kKnown, "; got ", wanted);
  return baseline::kernels();
}
// Of the largest data cache of a level, from the kernel. (sysconf is no help: on some AMD machines it gives the L3 of
// all sockets' worth of cores, ten times too much.)
int64_t cache_bytes(int level, int64_t otherwise) {
  int64_t largest = 0;
  for (int index = 0; index < 8; ++index) {
    const std::string folder = "/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(index) + "/";
    int its_level = 0;
    int64_t size = 0;
    char unit = 0;
    std::ifstream(folder + "level") >> its_level;
    std::ifstream(folder + "size") >> size >> unit;
    if (its_level == level) largest = std::max(largest, unit == 'M' ? size << 20 : unit == 'K' ? size << 10 : size);
  }
  return largest > 0 ? largest : otherwise;
}

void check_contiguous(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.is_contiguous(), "senet_fused: ", name, " must be contiguous");
}

template <class A>
void apply(const Tensor& x, Function f, double p0, double p1, const Tensor& value, const std::optional<Tensor>& slope) {
  const A* v = static_cast<const A*>(x.const_data_ptr());
  A* out = static_cast<A*>(value.mutable_data_ptr());
  if (!slope.has_value()) return Tables<A>::function()->apply(f, p0, p1, v, out, x.numel());
  Tables<A>::function()->apply_with_slope(f, p0, p1, v, out, static_cast<A*>(slope->mutable_data_ptr()), x.numel());
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& table = choose_kernels();
  return table;
}

CpuFacts facts() {
  static const int64_t l2 = cache_bytes(2, 1 << 20), l3 = cache_bytes(3, 16 << 20);
  return {torch::stable::get_num_threads(), l2, l3};
}

void parallel_for(int64_t count, void (*body)(int64_t, int64_t, void*), void* context) {
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) { body(begin, end, context); });
}

void function_cpu(Tensor x, int64_t f, double p0, double p1, Tensor value, std::optional<Tensor> slope) {
  const bool wide = x.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(x.is_cpu(), "senet_fused: x must be on the CPU");
  STD_TORCH_CHECK(wide || x.scalar_type() == ScalarType::Float, "senet_fused: x must be float64 or float32");
  STD_TORCH_CHECK(f >= 0 && f < kFunctions, "senet_fused: unknown function code ", f);
  check_contiguous(x, "x");
  check_same_shape(value, "value", x);
  check_contiguous(value, "value");
  if (slope.has_value()) {
    check_same_shape(*slope, "slope", x);
    check_contiguous(*slope, "slope");
  }
  (wide ? apply<double> : apply<float>)(x, static_cast<Function>(f), p0, p1, value, slope);
}

std::string cpu_instruction_set() { return kernels().name; }

}  // namespace senet
