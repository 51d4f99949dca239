#include "tail.h"

#include "host.h"
#include "tail_schedule.h"

namespace senet {
namespace {

void serially(int64_t count, void (*body)(int64_t, int64_t, void*), void* context) { body(0, count, context); }

// w1: of the gate, or nothing.
template <class A>
void fill_tail(Layer<A>& layer, const Tensor& x, const std::optional<Tensor>& w1, const std::optional<Tensor>& w2,
               bool channels_last, bool backward) {
  STD_TORCH_CHECK(x.dim() >= 3, "senet_fused: x must be [N, C, *spatial], got ", text(x));
  STD_TORCH_CHECK(w1.has_value() == w2.has_value(), "senet_fused: w1 and w2 go together");
  int64_t m = 1;
  for (int64_t d = 2; d < x.dim(); ++d) m *= x.size(d);
  STD_TORCH_CHECK(m > 0 && x.size(1) > 0, "senet_fused: empty channels or positions: x ", text(x));
  Problem& p = layer.problem;
  p = {x.size(0), x.size(1), 0, m, element_size(x.scalar_type()), 0, channels_last, backward};
  if (w1.has_value()) {
    STD_TORCH_CHECK(w1->dim() >= 2 && w1->size(0) > 0, "senet_fused: w1 must be [R, C], got ", text(*w1));
    p.r = w1->size(0);
    p.weight_size = element_size(w1->scalar_type());
    check_dense(*w1, "w1", {p.r, p.c}, w1->scalar_type(), x);
    check_dense(*w2, "w2", {p.c, p.r}, w1->scalar_type(), x);
    layer.w1 = w1->const_data_ptr();
    layer.w2 = w2->const_data_ptr();
    layer.weight = Tables<A>::weight(w1->scalar_type());
    STD_TORCH_CHECK(layer.weight != nullptr, "senet_fused: no kernel for weights of this dtype beside x's dtype");
  }
  layer.plan = plan_cpu_tail(p, facts());
  layer.parallel_for = layer.plan.strategy == CpuStrategy::serial ? serially : parallel_for;
  layer.tensor = Tables<A>::tensor(x.scalar_type());
  layer.function = Tables<A>::function();
}

template <class A>
void fill_input(Tail<A>& call, const Tensor& x, const std::optional<Tensor>& weight, const Tensor& statistics,
                const std::optional<Tensor>& factor, const std::optional<Tensor>& gate) {
  const Problem& p = call.problem;
  call.x_stride = check_samples(x, "x", p.channels_last);
  call.x = static_cast<const char*>(x.const_data_ptr());
  call.weight = optional_vector<A>(weight, "weight", {p.c}, x);
  call.factor = optional_vector<A>(factor, "factor", {p.n}, x);
  check_dense(statistics, "statistics", {3, p.c}, Tables<A>::kType, x);
  call.statistics = static_cast<const A*>(statistics.const_data_ptr());
  call.gated = gate.has_value();
  call.gate = optional_vector<A>(gate, "gate", {p.n, p.c}, x);
}

// The place of a large output.
char* output(const Tensor& t, const char* name, const Tensor& x, const Problem& p) {
  check_same_shape(t, name, x);
  STD_TORCH_CHECK(check_samples(t, name, p.channels_last) == p.c * p.m, "senet_fused: ", name, " must be dense");
  return static_cast<char*>(t.mutable_data_ptr());
}

template <class A>
A* vector(const Tensor& t, const char* name, std::initializer_list<int64_t> sizes, const Tensor& x) {
  check_dense(t, name, sizes, Tables<A>::kType, x);
  return static_cast<A*>(t.mutable_data_ptr());
}

template <class A>
const uint8_t* bits(const std::optional<Tensor>& mask, const Problem& p, const Tensor& x) {
  if (!mask.has_value()) return nullptr;
  check_mask(*mask, p, x);
  return static_cast<const uint8_t*>(mask->const_data_ptr());
}

template <class A>
void moments(const Tensor& x, double eps, bool channels_last, std::optional<Tensor>& saved,
             std::optional<Tensor>& statistics) {
  TailMoments<A> call{};
  fill_tail<A>(call, x, std::nullopt, std::nullopt, channels_last, false);
  const Problem& p = call.problem;
  call.x_stride = check_samples(x, "x", channels_last);
  call.x = static_cast<const char*>(x.const_data_ptr());
  call.eps = eps;
  if (statistics.has_value()) call.statistics = vector<A>(*statistics, "statistics", {3, p.c}, x);
  if (saved.has_value()) {
    STD_TORCH_CHECK(saved->dim() == 2 && saved->size(1) > p.c, "senet_fused: saved must be [N, C + R], got ",
                    text(*saved));
    call.xbar_stride = saved->size(1);
    call.xbar = vector<A>(*saved, "saved", {p.n, call.xbar_stride}, x);
  }
  call.run();
}

template <class A>
void forward(const Tensor& x, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
             const Tensor& statistics, const std::optional<Tensor>& w1, const std::optional<Tensor>& b1,
             const std::optional<Tensor>& w2, const std::optional<Tensor>& b2, const std::optional<Tensor>& residual,
             const std::optional<Tensor>& factor, const Options& options, bool channels_last, const Tensor& y,
             const std::optional<Tensor>& gate, const std::optional<Tensor>& saved, const std::optional<Tensor>& mask) {
  TailForward<A> call{};
  fill_tail<A>(call, x, w1, w2, channels_last, false);
  const Problem& p = call.problem;
  call.options = options;
  STD_TORCH_CHECK(gate.has_value() == w1.has_value() && saved.has_value() == w1.has_value(),
                  "senet_fused: w1, gate and saved go together");
  fill_input<A>(call, x, weight, statistics, factor, gate);
  call.bias = optional_vector<A>(bias, "bias", {p.c}, x);
  call.b1 = optional_vector<A>(b1, "b1", {p.r}, x);
  call.b2 = optional_vector<A>(b2, "b2", {p.c}, x);
  if (residual.has_value()) {
    check_same_shape(*residual, "residual", x);
    call.residual_stride = check_samples(*residual, "residual", channels_last);
    call.residual = static_cast<const char*>(residual->const_data_ptr());
  }
  call.y = output(y, "y", x, p);
  if (gate.has_value()) {
    call.gate_out = vector<A>(*gate, "gate", {p.n, p.c}, x);
    call.saved = vector<A>(*saved, "saved", {p.n, p.c + p.r}, x);
  }
  if (mask.has_value() && options.relu) call.mask = const_cast<uint8_t*>(bits<A>(mask, p, x));
  call.run();
}

template <class A>
void sums(const Tensor& dy, const Tensor& x, const std::optional<Tensor>& mask, const std::optional<Tensor>& weight,
          const std::optional<Tensor>& bias, const Tensor& statistics, const std::optional<Tensor>& w1,
          const std::optional<Tensor>& w2, const std::optional<Tensor>& factor, const std::optional<Tensor>& gate,
          const std::optional<Tensor>& saved, const Options& options, bool channels_last, const Tensor& dweight,
          const Tensor& dbias, const std::optional<Tensor>& dpooled, const std::optional<Tensor>& dw1,
          const std::optional<Tensor>& db1, const std::optional<Tensor>& dw2, const std::optional<Tensor>& db2) {
  TailSums<A> call{};
  fill_tail<A>(call, x, w1, w2, channels_last, true);
  const Problem& p = call.problem;
  call.options = options;
  STD_TORCH_CHECK(gate.has_value() == w1.has_value() && saved.has_value() == w1.has_value() &&
                      dpooled.has_value() == w1.has_value(),
                  "senet_fused: w1, gate, saved and dpooled go together");
  fill_input<A>(call, x, weight, statistics, factor, gate);
  call.bias = optional_vector<A>(bias, "bias", {p.c}, x);
  check_same_shape(dy, "dy", x);
  call.dy_stride = check_samples(dy, "dy", channels_last);
  call.dy = static_cast<const char*>(dy.const_data_ptr());
  call.mask = bits<A>(mask, p, x);
  call.dweight = vector<A>(dweight, "dweight", {p.c}, x);
  call.dbias = vector<A>(dbias, "dbias", {p.c}, x);
  if (w1.has_value()) {
    call.saved = vector<A>(*saved, "saved", {p.n, p.c + p.r}, x);
    call.dpooled = vector<A>(*dpooled, "dpooled", {p.n, p.c}, x);
  }
  STD_TORCH_CHECK(dw1.has_value() == dw2.has_value() && (dw1.has_value() || (!db1.has_value() && !db2.has_value())) &&
                      (w1.has_value() || !dw1.has_value()),
                  "senet_fused: dw1 and dw2 go together, need w1, and db1 and db2 need them");
  if (dw1.has_value()) {
    check_dense(*dw1, "dw1", {p.r, p.c}, w1->scalar_type(), x);
    check_dense(*dw2, "dw2", {p.c, p.r}, w1->scalar_type(), x);
    call.dw1 = dw1->mutable_data_ptr();
    call.dw2 = dw2->mutable_data_ptr();
    if (db1.has_value()) call.db1 = vector<A>(*db1, "db1", {p.r}, x);
    if (db2.has_value()) call.db2 = vector<A>(*db2, "db2", {p.c}, x);
  }
  call.run();
}

template <class A>
void gradient(const Tensor& dy, const Tensor& x, const std::optional<Tensor>& mask, const std::optional<Tensor>& weight,
              const Tensor& statistics, const std::optional<Tensor>& factor, const std::optional<Tensor>& gate,
              const Tensor& dweight, const Tensor& dbias, const std::optional<Tensor>& dpooled, double count,
              bool channels_last, const Tensor& dx, const std::optional<Tensor>& dresidual) {
  TailGradient<A> call{};
  fill_tail<A>(call, x, std::nullopt, std::nullopt, channels_last, true);
  const Problem& p = call.problem;
  STD_TORCH_CHECK(gate.has_value() == dpooled.has_value(), "senet_fused: gate and dpooled go together");
  STD_TORCH_CHECK(mask.has_value() || !dresidual.has_value(), "senet_fused: without post_act dresidual is dy");
  fill_input<A>(call, x, weight, statistics, factor, gate);
  check_same_shape(dy, "dy", x);
  call.dy_stride = check_samples(dy, "dy", channels_last);
  call.dy = static_cast<const char*>(dy.const_data_ptr());
  call.mask = bits<A>(mask, p, x);
  call.dweight = vector<A>(dweight, "dweight", {p.c}, x);
  call.dbias = vector<A>(dbias, "dbias", {p.c}, x);
  call.dpooled = optional_vector<A>(dpooled, "dpooled", {p.n, p.c}, x);
  call.count = count;
  call.dx = output(dx, "dx", x, p);
  if (dresidual.has_value()) call.dresidual = output(*dresidual, "dresidual", x, p);
  call.run();
}

bool wide(const Tensor& x) {
  STD_TORCH_CHECK(x.is_cpu(), "senet_fused: x must be on the CPU");
  STD_TORCH_CHECK(is_supported(x.scalar_type()), "senet_fused: x must be float64, float32, bfloat16 or float16");
  return x.scalar_type() == ScalarType::Double;
}

}  // namespace

void tail_moments_cpu(Tensor x, double eps, bool channels_last, std::optional<Tensor> saved,
                      std::optional<Tensor> statistics) {
  (wide(x) ? moments<double> : moments<float>)(x, eps, channels_last, saved, statistics);
}

void tail_forward_cpu(Tensor x, std::optional<Tensor> weight, std::optional<Tensor> bias, Tensor statistics,
                      std::optional<Tensor> w1, std::optional<Tensor> b1, std::optional<Tensor> w2,
                      std::optional<Tensor> b2, std::optional<Tensor> residual, std::optional<Tensor> factor,
                      int64_t act, double act_p0, int64_t gate_fn, double gate_p0, double gate_p1, int64_t squeeze,
                      int64_t relu, bool channels_last, Tensor y, std::optional<Tensor> gate,
                      std::optional<Tensor> saved, std::optional<Tensor> mask) {
  const Options o = options(act, act_p0, gate_fn, gate_p0, gate_p1, squeeze, relu);
  (wide(x) ? forward<double> : forward<float>)(x, weight, bias, statistics, w1, b1, w2, b2, residual, factor, o,
                                               channels_last, y, gate, saved, mask);
}

void tail_sums_cpu(Tensor dy, Tensor x, std::optional<Tensor> mask, std::optional<Tensor> weight,
                   std::optional<Tensor> bias, Tensor statistics, std::optional<Tensor> w1, std::optional<Tensor> w2,
                   std::optional<Tensor> factor, std::optional<Tensor> gate, std::optional<Tensor> saved, int64_t act,
                   double act_p0, int64_t gate_fn, double gate_p0, double gate_p1, int64_t squeeze, int64_t relu,
                   bool channels_last, Tensor dweight, Tensor dbias, std::optional<Tensor> dpooled,
                   std::optional<Tensor> dw1, std::optional<Tensor> db1, std::optional<Tensor> dw2,
                   std::optional<Tensor> db2) {
  const Options o = options(act, act_p0, gate_fn, gate_p0, gate_p1, squeeze, relu);
  (wide(x) ? sums<double> : sums<float>)(dy, x, mask, weight, bias, statistics, w1, w2, factor, gate, saved, o,
                                         channels_last, dweight, dbias, dpooled, dw1, db1, dw2, db2);
}

void tail_gradient_cpu(Tensor dy, Tensor x, std::optional<Tensor> mask, std::optional<Tensor> weight, Tensor statistics,
                       std::optional<Tensor> factor, std::optional<Tensor> gate, Tensor dweight, Tensor dbias,
                       std::optional<Tensor> dpooled, double count, bool channels_last, Tensor dx,
                       std::optional<Tensor> dresidual) {
  (wide(x) ? gradient<double> : gradient<float>)(dy, x, mask, weight, statistics, factor, gate, dweight, dbias, dpooled,
                                                 count, channels_last, dx, dresidual);
}

}  // namespace senet
