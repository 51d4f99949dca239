#include "squeeze_excite.h"

#include <torch/csrc/stable/ops.h>

#include <cstdlib>
#include <cstring>
#include <fstream>
#include <string>

#include "../check.h"
#include "schedule.h"

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
const Kernels& kernels() {
  static const Kernels& table = choose_kernels();
  return table;
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
CpuFacts facts() {
  static const int64_t l2 = cache_bytes(2, 1 << 20), l3 = cache_bytes(3, 16 << 20);
  return {torch::stable::get_num_threads(), l2, l3};
}

void parallel_for(int64_t count, void (*body)(int64_t, int64_t, void*), void* context) {
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) { body(begin, end, context); });
}

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

bool is_supported(ScalarType t) {
  return t == ScalarType::Float || t == ScalarType::BFloat16 || t == ScalarType::Half || t == ScalarType::Double;
}

Options options(int64_t act, double act_p0, int64_t gate, double gate_p0, double gate_p1, int64_t squeeze,
                int64_t relu) {
  check_codes(act, gate, squeeze, relu);
  return {static_cast<Function>(act),    act_p0,   static_cast<Function>(gate), gate_p0, gate_p1,
          static_cast<Squeeze>(squeeze), relu == 1};
}

Problem problem(const Tensor& x, const Tensor& w1, bool channels_last, bool backward) {
  STD_TORCH_CHECK(x.is_cpu(), "senet_fused: x must be on the CPU");
  STD_TORCH_CHECK(is_supported(x.scalar_type()), "senet_fused: x must be float64, float32, bfloat16 or float16");
  return check_problem(x, w1, channels_last, backward);
}

template <class A>
void fill_layer(Layer<A>& layer, const Problem& p, const Options& o, const Tensor& x, const Tensor& w1,
                const Tensor& w2) {
  check_dense(w1, "w1", {p.r, p.c}, w1.scalar_type(), x);
  check_dense(w2, "w2", {p.c, p.r}, w1.scalar_type(), x);
  layer.problem = p;
  layer.options = o;
  layer.plan = plan_cpu(p, facts());
  layer.parallel_for = parallel_for;
  layer.tensor = Tables<A>::tensor(x.scalar_type());
  layer.weight = Tables<A>::weight(w1.scalar_type());
  layer.function = Tables<A>::function();
  STD_TORCH_CHECK(layer.weight != nullptr, "senet_fused: no kernel for weights of this dtype beside x's dtype");
}

template <class A>
const A* optional_vector(const std::optional<Tensor>& t, const char* name, std::initializer_list<int64_t> sizes,
                         const Tensor& x) {
  if (!t.has_value()) return nullptr;
  check_dense(*t, name, sizes, Tables<A>::kType, x);
  return static_cast<const A*>(t->const_data_ptr());
}

template <class A>
void forward(const Problem& p, const Options& o, const Tensor& x, const Tensor& w1, const std::optional<Tensor>& b1,
             const Tensor& w2, const std::optional<Tensor>& b2, const std::optional<Tensor>& residual, Tensor& y,
             std::optional<Tensor>& gate, std::optional<Tensor>& saved, std::optional<Tensor>& mask) {
  Forward<A> call{};
  fill_layer<A>(call, p, o, x, w1, w2);
  call.x_stride = check_samples(x, "x", p.channels_last);
  call.x = static_cast<const char*>(x.const_data_ptr());
  call.w1 = w1.const_data_ptr();
  call.w2 = w2.const_data_ptr();
  call.b1 = optional_vector<A>(b1, "b1", {p.r}, x);
  call.b2 = optional_vector<A>(b2, "b2", {p.c}, x);
  if (residual.has_value()) {
    check_same_shape(*residual, "residual", x);
    call.residual_stride = check_samples(*residual, "residual", p.channels_last);
    call.residual = static_cast<const char*>(residual->const_data_ptr());
  }
  check_same_shape(y, "y", x);
  STD_TORCH_CHECK(check_samples(y, "y", p.channels_last) == p.c * p.m, "senet_fused: y must be dense");
  call.y = static_cast<char*>(y.mutable_data_ptr());
  const Scratch<A> unkept((gate.has_value() ? 0 : p.n * p.c) + (saved.has_value() ? 0 : p.n * call.saved_stride()));
  call.gate = unkept.get();
  call.saved = unkept.get() + (gate.has_value() ? 0 : p.n * p.c);
  if (gate.has_value()) {
    check_dense(*gate, "gate", {p.n, p.c}, Tables<A>::kType, x);
    call.gate = static_cast<A*>(gate->mutable_data_ptr());
  }
  if (saved.has_value()) {
    check_dense(*saved, "saved", {p.n, call.saved_stride()}, Tables<A>::kType, x);
    call.saved = static_cast<A*>(saved->mutable_data_ptr());
  }
  if (o.relu && mask.has_value() && mask->dim() > 1) {
    check_mask(*mask, p, x);
    call.mask = static_cast<uint8_t*>(mask->mutable_data_ptr());
  }
  call.run();
}

template <class A>
void backward(const Problem& p, const Options& o, const Tensor& dy, const std::optional<Tensor>& dgate, const Tensor& x,
              const Tensor& w1, const Tensor& w2, const Tensor& gate, const Tensor& saved, const Tensor& mask,
              std::optional<Tensor>& dx, std::optional<Tensor>& dw1, std::optional<Tensor>& db1,
              std::optional<Tensor>& dw2, std::optional<Tensor>& db2, std::optional<Tensor>& dresidual) {
  Backward<A> call{};
  fill_layer<A>(call, p, o, x, w1, w2);
  call.x_stride = check_samples(x, "x", p.channels_last);
  call.x = static_cast<const char*>(x.const_data_ptr());
  check_same_shape(dy, "dy", x);
  call.dy_stride = check_samples(dy, "dy", p.channels_last);
  call.dy = static_cast<const char*>(dy.const_data_ptr());
  call.dgate = optional_vector<A>(dgate, "dgate", {p.n, p.c}, x);
  call.w1 = w1.const_data_ptr();
  call.w2 = w2.const_data_ptr();
  check_dense(gate, "gate", {p.n, p.c}, Tables<A>::kType, x);
  call.gate = static_cast<const A*>(gate.const_data_ptr());
  check_dense(saved, "saved", {p.n, call.saved_stride()}, Tables<A>::kType, x);
  call.saved = static_cast<const A*>(saved.const_data_ptr());
  if (o.relu) {
    check_mask(mask, p, x);
    call.mask = static_cast<const uint8_t*>(mask.const_data_ptr());
  }
  STD_TORCH_CHECK(dw1.has_value() == dw2.has_value(), "senet_fused: dw1 and dw2 go together");
  STD_TORCH_CHECK(dw1.has_value() || (!db1.has_value() && !db2.has_value()), "senet_fused: db1, db2 need dw1, dw2");
  for (auto& [out, name] : {std::pair{&dx, "dx"}, std::pair{&dresidual, "dresidual"}}) {
    if (!out->has_value()) continue;
    check_same_shape(**out, name, x);
    STD_TORCH_CHECK(check_samples(**out, name, p.channels_last) == p.c * p.m, "senet_fused: ", name, " must be dense");
  }
  STD_TORCH_CHECK(!dresidual.has_value() || o.relu, "senet_fused: without post_act dresidual is dy");
  if (dx.has_value()) call.dx = static_cast<char*>(dx->mutable_data_ptr());
  if (dresidual.has_value()) call.dresidual = static_cast<char*>(dresidual->mutable_data_ptr());
  if (dw1.has_value()) {
    check_dense(*dw1, "dw1", {p.r, p.c}, w1.scalar_type(), x);
    check_dense(*dw2, "dw2", {p.c, p.r}, w1.scalar_type(), x);
    call.dw1 = dw1->mutable_data_ptr();
    call.dw2 = dw2->mutable_data_ptr();
  }
  call.db1 = const_cast<A*>(optional_vector<A>(db1, "db1", {p.r}, x));
  call.db2 = const_cast<A*>(optional_vector<A>(db2, "db2", {p.c}, x));
  call.run();
}

}  // namespace

void squeeze_excite_cpu(Tensor x, Tensor w1, std::optional<Tensor> b1, Tensor w2, std::optional<Tensor> b2,
                        std::optional<Tensor> residual, int64_t act, double act_p0, int64_t gate_fn, double gate_p0,
                        double gate_p1, int64_t squeeze, int64_t relu, bool channels_last, Tensor y,
                        std::optional<Tensor> gate, std::optional<Tensor> saved, std::optional<Tensor> mask) {
  const Problem p = problem(x, w1, channels_last, false);
  const Options o = options(act, act_p0, gate_fn, gate_p0, gate_p1, squeeze, relu);
  const bool wide = x.scalar_type() == ScalarType::Double;
  (wide ? forward<double> : forward<float>)(p, o, x, w1, b1, w2, b2, residual, y, gate, saved, mask);
}

void squeeze_excite_backward_cpu(Tensor dy, std::optional<Tensor> dgate, Tensor x, Tensor w1, Tensor w2, Tensor gate,
                                 Tensor saved, Tensor mask, int64_t act, double act_p0, int64_t gate_fn, double gate_p0,
                                 double gate_p1, int64_t squeeze, int64_t relu, bool channels_last,
                                 std::optional<Tensor> dx, std::optional<Tensor> dw1, std::optional<Tensor> db1,
                                 std::optional<Tensor> dw2, std::optional<Tensor> db2,
                                 std::optional<Tensor> dresidual) {
  const Problem p = problem(x, w1, channels_last, true);
  const Options o = options(act, act_p0, gate_fn, gate_p0, gate_p1, squeeze, relu);
  const bool wide = x.scalar_type() == ScalarType::Double;
  (wide ? backward<double> : backward<float>)(p, o, dy, dgate, x, w1, w2, gate, saved, mask, dx, dw1, db1, dw2, db2,
                                              dresidual);
}

std::string cpu_instruction_set() { return kernels().name; }

}  // namespace senet
