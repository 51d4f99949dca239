#include "fused_se.h"

#include "host.h"
#include "schedule.h"

namespace senet {
namespace {

void serially(int64_t count, void (*body)(int64_t, int64_t, void*), void* context) { body(0, count, context); }

// ------------------------------------------------------------------------------------------------ inputs

template <class A>
const A* input(const Tensor& t, const char* name, std::initializer_list<int64_t> sizes, const Tensor& x) {
  check_dense(t, name, sizes, Tables<A>::kType, x);
  return static_cast<const A*>(t.const_data_ptr());
}

template <class A>
const A* input(const std::optional<Tensor>& t, const char* name, std::initializer_list<int64_t> sizes,
               const Tensor& x) {
  return t.has_value() ? input<A>(*t, name, sizes, x) : nullptr;
}

// A tensor like x; stride: how far its samples are apart.
const char* sweep_input(const Tensor& t, const char* name, const Tensor& x, bool channels_last, int64_t& stride) {
  check_same_shape(t, name, x);
  stride = check_samples(t, name, channels_last);
  return static_cast<const char*>(t.const_data_ptr());
}

const uint8_t* bits(const std::optional<Tensor>& mask, const Problem& p, const Tensor& x) {
  if (!mask.has_value()) return nullptr;
  check_mask(*mask, p, x);
  return static_cast<const uint8_t*>(mask->const_data_ptr());
}

// ------------------------------------------------------------------------------------------------ outputs

template <class A>
A* output(const Tensor& t, const char* name, std::initializer_list<int64_t> sizes, const Tensor& x) {
  check_dense(t, name, sizes, Tables<A>::kType, x);
  return static_cast<A*>(t.mutable_data_ptr());
}

template <class A>
A* output(const std::optional<Tensor>& t, const char* name, std::initializer_list<int64_t> sizes, const Tensor& x) {
  return t.has_value() ? output<A>(*t, name, sizes, x) : nullptr;
}

char* sweep_output(const Tensor& t, const char* name, const Tensor& x, const Problem& p) {
  check_same_shape(t, name, x);
  STD_TORCH_CHECK(check_samples(t, name, p.channels_last) == p.c * p.m, "senet_fused: ", name, " must be dense");
  return static_cast<char*>(t.mutable_data_ptr());
}

char* sweep_output(const std::optional<Tensor>& t, const char* name, const Tensor& x, const Problem& p) {
  return t.has_value() ? sweep_output(*t, name, x, p) : nullptr;
}

// The weights' gradients, of a call that has them (Backward, GradientSums).
template <class A, class Call>
void fill_weight_gradients(Call& call, const Tensor& x, const std::optional<Tensor>& w1,
                           const std::optional<Tensor>& dw1, const std::optional<Tensor>& db1,
                           const std::optional<Tensor>& dw2, const std::optional<Tensor>& db2) {
  const Problem& p = call.problem;
  STD_TORCH_CHECK(dw1.has_value() == dw2.has_value() && (dw1.has_value() || (!db1.has_value() && !db2.has_value())) &&
                      (w1.has_value() || !dw1.has_value()),
                  "senet_fused: dw1 and dw2 go together, need w1, and db1 and db2 need them");
  if (!dw1.has_value()) return;
  check_dense(*dw1, "dw1", {p.r, p.c}, w1->scalar_type(), x);
  check_dense(*dw2, "dw2", {p.c, p.r}, w1->scalar_type(), x);
  call.dw1 = dw1->mutable_data_ptr();
  call.dw2 = dw2->mutable_data_ptr();
  call.db1 = output<A>(db1, "db1", {p.r}, x);
  call.db2 = output<A>(db2, "db2", {p.c}, x);
}

// ------------------------------------------------------------------------------------------------ calls

// Sizes, plan, kernels, x and the weights of the gate, if there is one.
template <class A>
void fill_layer(Layer<A>& layer, const Tensor& x, const std::optional<Tensor>& w1, const std::optional<Tensor>& w2,
                bool channels_last, bool backward, bool norm) {
  STD_TORCH_CHECK(w1.has_value() == w2.has_value(), "senet_fused: w1 and w2 go together");
  STD_TORCH_CHECK(w1.has_value() || norm, "senet_fused: w1 and w2, or statistics, must be there");
  const Problem& p = layer.problem = check_problem(x, w1, channels_last, backward);
  if (w1.has_value()) {
    check_dense(*w1, "w1", {p.r, p.c}, w1->scalar_type(), x);
    check_dense(*w2, "w2", {p.c, p.r}, w1->scalar_type(), x);
    layer.w1 = w1->const_data_ptr();
    layer.w2 = w2->const_data_ptr();
    layer.products = Tables<A>::weight(w1->scalar_type());
    STD_TORCH_CHECK(layer.products != nullptr, "senet_fused: no kernel for weights of this dtype beside x's dtype");
  }
  // Behind an activation the squeeze and the scaling are two sweeps of one sample, as an SE layer's.
  const bool of_samples = !norm || (layer.has_pre_act() && p.r > 0 && !backward);
  layer.plan = of_samples ? plan_cpu(p, facts()) : plan_cpu_tail(p, facts());
  // With a norm the serial strategy is the stages of phases, one after the other.
  layer.parallel_for = layer.plan.strategy == CpuStrategy::serial ? serially : parallel_for;
  layer.tensor = Tables<A>::tensor(x.scalar_type());
  layer.function = Tables<A>::function();
  layer.x = sweep_input(x, "x", x, channels_last, layer.x_stride);
}

template <class A>
void fill_norm(Layer<A>& layer, const Tensor& x, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
               const std::optional<Tensor>& statistics, const std::optional<Tensor>& factor) {
  const Problem& p = layer.problem;
  STD_TORCH_CHECK(statistics.has_value() || (!weight.has_value() && !bias.has_value() && !factor.has_value()),
                  "senet_fused: weight, bias and factor need statistics");
  layer.statistics = input<A>(statistics, "statistics", {3, p.c}, x);
  layer.weight = input<A>(weight, "weight", {p.c}, x);
  layer.bias = input<A>(bias, "bias", {p.c}, x);
  layer.factor = input<A>(factor, "factor", {p.n}, x);
}

template <class A>
void moments(const Tensor& x, double eps, bool channels_last, const std::optional<Tensor>& saved,
             const std::optional<Tensor>& statistics) {
  Moments<A> call{};
  fill_layer<A>(call, x, std::nullopt, std::nullopt, channels_last, false, true);
  const Problem& p = call.problem;
  call.eps = eps;
  call.out = output<A>(statistics, "statistics", {3, p.c}, x);
  if (saved.has_value()) {
    STD_TORCH_CHECK(saved->dim() == 2 && saved->size(1) > p.c, "senet_fused: saved must be [N, C + R], got ",
                    text(*saved));
    call.xbar_stride = saved->size(1);
    call.xbar = output<A>(*saved, "saved", {p.n, call.xbar_stride}, x);
  }
  call.run();
}

template <class A>
void forward(const Tensor& x, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
             const std::optional<Tensor>& statistics, const std::optional<Tensor>& w1, const std::optional<Tensor>& b1,
             const std::optional<Tensor>& w2, const std::optional<Tensor>& b2, const std::optional<Tensor>& residual,
             const std::optional<Tensor>& factor, const Options& options, bool channels_last, const Tensor& y,
             const std::optional<Tensor>& gate, const std::optional<Tensor>& saved, const std::optional<Tensor>& mask) {
  Forward<A> call{};
  call.options = options;
  const bool norm = statistics.has_value();
  fill_layer<A>(call, x, w1, w2, channels_last, false, norm);
  const Problem& p = call.problem;
  fill_norm<A>(call, x, weight, bias, statistics, factor);
  STD_TORCH_CHECK(!norm || options.squeeze == Squeeze::avg, "senet_fused: with a norm the squeeze must be avg");
  STD_TORCH_CHECK(norm || !call.has_pre_act(), "senet_fused: pre_act needs statistics");
  STD_TORCH_CHECK(!norm || (gate.has_value() == w1.has_value() && saved.has_value() == w1.has_value()),
                  "senet_fused: with a norm w1, gate and saved go together");
  call.b1 = input<A>(b1, "b1", {p.r}, x);
  call.b2 = input<A>(b2, "b2", {p.c}, x);
  if (residual.has_value()) call.residual = sweep_input(*residual, "residual", x, channels_last, call.residual_stride);
  call.y = sweep_output(y, "y", x, p);
  // Without a norm the gate and what is saved are made in any case.
  const int64_t gates = norm || gate.has_value() ? 0 : p.n * p.c;
  const Scratch<A> unkept(gates + (norm || saved.has_value() ? 0 : p.n * call.saved_stride()));
  call.gate_out = gates > 0 ? unkept.get() : output<A>(gate, "gate", {p.n, p.c}, x);
  call.gate = call.gate_out;
  call.saved = saved.has_value() ? output<A>(*saved, "saved", {p.n, call.saved_stride()}, x) : unkept.get() + gates;
  if (options.relu && mask.has_value()) call.mask = const_cast<uint8_t*>(bits(mask, p, x));
  call.run();
}

// What every stage of a backward reads.
template <class A>
void fill_backward(BackwardLayer<A>& call, const Tensor& dy, const Tensor& x, const std::optional<Tensor>& mask,
                   const std::optional<Tensor>& gate, const std::optional<Tensor>& saved) {
  const Problem& p = call.problem;
  call.dy = sweep_input(dy, "dy", x, p.channels_last, call.dy_stride);
  call.mask = bits(mask, p, x);
  call.gate = input<A>(gate, "gate", {p.n, p.c}, x);
  call.saved = input<A>(saved, "saved", {p.n, call.saved_stride()}, x);
}

template <class A>
void backward(const Tensor& dy, const std::optional<Tensor>& dgate, const Tensor& x, const Tensor& w1, const Tensor& w2,
              const Tensor& gate, const Tensor& saved, const std::optional<Tensor>& mask, const Options& options,
              bool channels_last, const std::optional<Tensor>& dx, const std::optional<Tensor>& dw1,
              const std::optional<Tensor>& db1, const std::optional<Tensor>& dw2, const std::optional<Tensor>& db2,
              const std::optional<Tensor>& dresidual) {
  Backward<A> call{};
  call.options = options;
  fill_layer<A>(call, x, w1, w2, channels_last, true, false);
  const Problem& p = call.problem;
  STD_TORCH_CHECK(!options.relu || mask.has_value(), "senet_fused: a ReLU's backward needs its mask");
  STD_TORCH_CHECK(!dresidual.has_value() || options.relu, "senet_fused: without post_act dresidual is dy");
  fill_backward<A>(call, dy, x, options.relu ? mask : std::nullopt, gate, saved);
  call.dgate = input<A>(dgate, "dgate", {p.n, p.c}, x);
  call.dx = sweep_output(dx, "dx", x, p);
  call.dresidual = sweep_output(dresidual, "dresidual", x, p);
  fill_weight_gradients<A>(call, x, w1, dw1, db1, dw2, db2);
  call.run();
}

template <class A>
void gradient_sums(const Tensor& dy, const Tensor& x, const std::optional<Tensor>& mask,
                   const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, const Tensor& statistics,
                   const std::optional<Tensor>& w1, const std::optional<Tensor>& w2,
                   const std::optional<Tensor>& factor, const std::optional<Tensor>& gate,
                   const std::optional<Tensor>& saved, const Options& options, bool channels_last,
                   const Tensor& dweight, const Tensor& dbias, const std::optional<Tensor>& dpooled,
                   const std::optional<Tensor>& dw1, const std::optional<Tensor>& db1, const std::optional<Tensor>& dw2,
                   const std::optional<Tensor>& db2) {
  GradientSums<A> call{};
  call.options = options;
  fill_layer<A>(call, x, w1, w2, channels_last, true, true);
  const Problem& p = call.problem;
  STD_TORCH_CHECK(gate.has_value() == w1.has_value() && saved.has_value() == w1.has_value() &&
                      dpooled.has_value() == w1.has_value(),
                  "senet_fused: w1, gate, saved and dpooled go together");
  fill_norm<A>(call, x, weight, bias, statistics, factor);
  fill_backward<A>(call, dy, x, mask, gate, saved);
  call.dweight = output<A>(dweight, "dweight", {p.c}, x);
  call.dbias = output<A>(dbias, "dbias", {p.c}, x);
  call.dpooled = output<A>(dpooled, "dpooled", {p.n, p.c}, x);
  fill_weight_gradients<A>(call, x, w1, dw1, db1, dw2, db2);
  call.run();
}

template <class A>
void gradient(const Tensor& dy, const Tensor& x, const std::optional<Tensor>& mask, const std::optional<Tensor>& weight,
              const std::optional<Tensor>& bias, const Tensor& statistics, const std::optional<Tensor>& factor,
              const std::optional<Tensor>& gate, const Tensor& dweight, const Tensor& dbias,
              const std::optional<Tensor>& dpooled, double count, const Options& options, bool channels_last,
              const Tensor& dx, const std::optional<Tensor>& dresidual) {
  Gradient<A> call{};
  call.options = options;
  fill_layer<A>(call, x, std::nullopt, std::nullopt, channels_last, true, true);
  const Problem& p = call.problem;
  STD_TORCH_CHECK(gate.has_value() == dpooled.has_value(), "senet_fused: gate and dpooled go together");
  STD_TORCH_CHECK(mask.has_value() || !dresidual.has_value(), "senet_fused: without post_act dresidual is dy");
  fill_norm<A>(call, x, weight, bias, statistics, factor);
  fill_backward<A>(call, dy, x, mask, gate, std::nullopt);
  call.dweight = input<A>(dweight, "dweight", {p.c}, x);
  call.dbias = input<A>(dbias, "dbias", {p.c}, x);
  call.dpooled = input<A>(dpooled, "dpooled", {p.n, p.c}, x);
  call.count = count;
  call.dx = sweep_output(dx, "dx", x, p);
  call.dresidual = sweep_output(dresidual, "dresidual", x, p);
  call.run();
}

// Whether the accumulation type is double.
bool wide(const Tensor& x) {
  STD_TORCH_CHECK(x.is_cpu(), "senet_fused: x must be on the CPU");
  STD_TORCH_CHECK(is_supported(x.scalar_type()), "senet_fused: x must be float64, float32, bfloat16 or float16");
  return x.scalar_type() == ScalarType::Double;
}

}  // namespace

void moments_cpu(Tensor x, double eps, bool channels_last, std::optional<Tensor> saved,
                 std::optional<Tensor> statistics) {
  (wide(x) ? moments<double> : moments<float>)(x, eps, channels_last, saved, statistics);
}

void forward_cpu(Tensor x, std::optional<Tensor> weight, std::optional<Tensor> bias, std::optional<Tensor> statistics,
                 std::optional<Tensor> w1, std::optional<Tensor> b1, std::optional<Tensor> w2, std::optional<Tensor> b2,
                 std::optional<Tensor> residual, std::optional<Tensor> factor, int64_t act, double act_p0,
                 int64_t gate_fn, double gate_p0, double gate_p1, int64_t squeeze, int64_t relu, int64_t pre_act,
                 double pre_act_p0, bool channels_last, Tensor y, std::optional<Tensor> gate,
                 std::optional<Tensor> saved, std::optional<Tensor> mask) {
  const Options o = options(act, act_p0, gate_fn, gate_p0, gate_p1, squeeze, relu, pre_act, pre_act_p0);
  (wide(x) ? forward<double> : forward<float>)(x, weight, bias, statistics, w1, b1, w2, b2, residual, factor, o,
                                               channels_last, y, gate, saved, mask);
}

void backward_cpu(Tensor dy, std::optional<Tensor> dgate, Tensor x, Tensor w1, Tensor w2, Tensor gate, Tensor saved,
                  std::optional<Tensor> mask, int64_t act, double act_p0, int64_t gate_fn, double gate_p0,
                  double gate_p1, int64_t squeeze, int64_t relu, bool channels_last, std::optional<Tensor> dx,
                  std::optional<Tensor> dw1, std::optional<Tensor> db1, std::optional<Tensor> dw2,
                  std::optional<Tensor> db2, std::optional<Tensor> dresidual) {
  const Options o = options(act, act_p0, gate_fn, gate_p0, gate_p1, squeeze, relu, 0, 0);
  (wide(x) ? backward<double> : backward<float>)(dy, dgate, x, w1, w2, gate, saved, mask, o, channels_last, dx, dw1,
                                                 db1, dw2, db2, dresidual);
}

void gradient_sums_cpu(Tensor dy, Tensor x, std::optional<Tensor> mask, std::optional<Tensor> weight,
                       std::optional<Tensor> bias, Tensor statistics, std::optional<Tensor> w1,
                       std::optional<Tensor> w2, std::optional<Tensor> factor, std::optional<Tensor> gate,
                       std::optional<Tensor> saved, int64_t act, double act_p0, int64_t gate_fn, double gate_p0,
                       double gate_p1, int64_t squeeze, int64_t relu, int64_t pre_act, double pre_act_p0,
                       bool channels_last, Tensor dweight, Tensor dbias, std::optional<Tensor> dpooled,
                       std::optional<Tensor> dw1, std::optional<Tensor> db1, std::optional<Tensor> dw2,
                       std::optional<Tensor> db2) {
  const Options o = options(act, act_p0, gate_fn, gate_p0, gate_p1, squeeze, relu, pre_act, pre_act_p0);
  (wide(x) ? gradient_sums<double> : gradient_sums<float>)(dy, x, mask, weight, bias, statistics, w1, w2, factor, gate,
                                                           saved, o, channels_last, dweight, dbias, dpooled, dw1, db1,
                                                           dw2, db2);
}

void gradient_cpu(Tensor dy, Tensor x, std::optional<Tensor> mask, std::optional<Tensor> weight,
                  std::optional<Tensor> bias, Tensor statistics, std::optional<Tensor> factor,
                  std::optional<Tensor> gate, Tensor dweight, Tensor dbias, std::optional<Tensor> dpooled, double count,
                  int64_t pre_act, double pre_act_p0, bool channels_last, Tensor dx, std::optional<Tensor> dresidual) {
  const Options o = options(0, 0, 0, 0, 0, 0, 0, pre_act, pre_act_p0);
  (wide(x) ? gradient<double> : gradient<float>)(dy, x, mask, weight, bias, statistics, factor, gate, dweight, dbias,
                                                 dpooled, count, o, channels_last, dx, dresidual);
}

}  // namespace senet
