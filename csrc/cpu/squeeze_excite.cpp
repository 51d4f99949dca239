#include "squeeze_excite.h"

#include "host.h"
#include "schedule.h"

namespace senet {
namespace {

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
  layer.w1 = w1.const_data_ptr();
  layer.w2 = w2.const_data_ptr();
  layer.tensor = Tables<A>::tensor(x.scalar_type());
  layer.weight = Tables<A>::weight(w1.scalar_type());
  layer.function = Tables<A>::function();
  STD_TORCH_CHECK(layer.weight != nullptr, "senet_fused: no kernel for weights of this dtype beside x's dtype");
}

template <class A>
void forward(const Problem& p, const Options& o, const Tensor& x, const Tensor& w1, const std::optional<Tensor>& b1,
             const Tensor& w2, const std::optional<Tensor>& b2, const std::optional<Tensor>& residual, Tensor& y,
             std::optional<Tensor>& gate, std::optional<Tensor>& saved, std::optional<Tensor>& mask) {
  Forward<A> call{};
  fill_layer<A>(call, p, o, x, w1, w2);
  call.x_stride = check_samples(x, "x", p.channels_last);
  call.x = static_cast<const char*>(x.const_data_ptr());
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
              const Tensor& w1, const Tensor& w2, const Tensor& gate, const Tensor& saved,
              const std::optional<Tensor>& mask, std::optional<Tensor>& dx, std::optional<Tensor>& dw1,
              std::optional<Tensor>& db1, std::optional<Tensor>& dw2, std::optional<Tensor>& db2,
              std::optional<Tensor>& dresidual) {
  Backward<A> call{};
  fill_layer<A>(call, p, o, x, w1, w2);
  call.x_stride = check_samples(x, "x", p.channels_last);
  call.x = static_cast<const char*>(x.const_data_ptr());
  check_same_shape(dy, "dy", x);
  call.dy_stride = check_samples(dy, "dy", p.channels_last);
  call.dy = static_cast<const char*>(dy.const_data_ptr());
  call.dgate = optional_vector<A>(dgate, "dgate", {p.n, p.c}, x);
  check_dense(gate, "gate", {p.n, p.c}, Tables<A>::kType, x);
  call.gate = static_cast<const A*>(gate.const_data_ptr());
  check_dense(saved, "saved", {p.n, call.saved_stride()}, Tables<A>::kType, x);
  call.saved = static_cast<const A*>(saved.const_data_ptr());
  if (o.relu) {
    STD_TORCH_CHECK(mask.has_value(), "senet_fused: a ReLU's backward needs its mask");
    check_mask(*mask, p, x);
    call.mask = static_cast<const uint8_t*>(mask->const_data_ptr());
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
                                 Tensor saved, std::optional<Tensor> mask, int64_t act, double act_p0, int64_t gate_fn,
                                 double gate_p0, double gate_p1, int64_t squeeze, int64_t relu, bool channels_last,
                                 std::optional<Tensor> dx, std::optional<Tensor> dw1, std::optional<Tensor> db1,
                                 std::optional<Tensor> dw2, std::optional<Tensor> db2,
                                 std::optional<Tensor> dresidual) {
  const Problem p = problem(x, w1, channels_last, true);
  const Options o = options(act, act_p0, gate_fn, gate_p0, gate_p1, squeeze, relu);
  const bool wide = x.scalar_type() == ScalarType::Double;
  (wide ? backward<double> : backward<float>)(p, o, dy, dgate, x, w1, w2, gate, saved, mask, dx, dw1, db1, dw2, db2,
                                              dresidual);
}

}  // namespace senet
