// What the host files of the CPU operators share: which kernels run on this machine, and how a call's arguments become
// theirs.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>

#include "../check.h"
#include "layer.h"

namespace senet {

// The fastest table that this CPU can run; SENET_FUSED_ISA names a slower one.
const Kernels& kernels();
// "avx512_bf16", "avx512", "avx2" or "baseline".
std::string cpu_instruction_set();
// An elementwise function by its code: fills value, and its derivative at x if slope is there. x is float or double,
// contiguous, and value and slope are like it; value may be x.
void function_cpu(Tensor x, int64_t f, double p0, double p1, Tensor value, std::optional<Tensor> slope);
CpuFacts facts();
void parallel_for(int64_t count, void (*body)(int64_t, int64_t, void*), void* context);

// The kernels of one accumulation type.
template <class A>
struct Tables;
template <>
struct Tables<float> {
  static constexpr ScalarType kType = ScalarType::Float;
  static const TensorKernels<float>* tensor(ScalarType t) {
    const Kernels& k = kernels();
    return t == ScalarType::Float ? &k.float32 : t == ScalarType::BFloat16 ? &k.bfloat16 : &k.float16;
  }
  static const WeightKernels<float>* weight(ScalarType t) {
    const Kernels& k = kernels();
    if (t == ScalarType::Float) return &k.weight_float32;
    if (t == ScalarType::BFloat16) return &k.weight_bfloat16;
    return t == ScalarType::Half ? &k.weight_float16 : nullptr;
  }
  static const FunctionKernels<float>* function() { return &kernels().function_float; }
};
template <>
struct Tables<double> {
  static constexpr ScalarType kType = ScalarType::Double;
  static const TensorKernels<double>* tensor(ScalarType) { return &kernels().float64; }
  static const WeightKernels<double>* weight(ScalarType t) {
    return t == ScalarType::Double ? &kernels().weight_float64 : nullptr;
  }
  static const FunctionKernels<double>* function() { return &kernels().function_double; }
};

inline bool is_supported(ScalarType t) {
  return t == ScalarType::Float || t == ScalarType::BFloat16 || t == ScalarType::Half || t == ScalarType::Double;
}

inline Options options(int64_t act, double act_p0, int64_t gate, double gate_p0, double gate_p1, int64_t squeeze,
                       int64_t relu, int64_t pre_act, double pre_act_p0) {
  check_codes(act, gate, squeeze, relu);
  STD_TORCH_CHECK(pre_act >= 0 && pre_act < kFunctions, "senet_fused: unknown function code");
  return {static_cast<Function>(act),    act_p0,    static_cast<Function>(gate),    gate_p0,   gate_p1,
          static_cast<Squeeze>(squeeze), relu == 1, static_cast<Function>(pre_act), pre_act_p0};
}

}  // namespace senet
