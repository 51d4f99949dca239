#include "squeeze_excite.h"

#include "arguments.h"

namespace senet {
namespace {

float* fill_workspace(Call& call, const CudaWorkspace& w, const Tensor& memory, const std::optional<Tensor>& counters,
                      const Tensor& x) {
  float* first = workspace_of(memory, w.size, x);
  call.parts = at(first, w.parts);
  call.peaks = at(first, w.peaks);
  call.ties = at(first, w.ties);
  call.shares = at(first, w.shares);
  fill_counters(call, counters, x);
  return first;
}

}  // namespace

void squeeze_excite_cuda(Tensor x, Tensor w1, std::optional<Tensor> b1, Tensor w2, std::optional<Tensor> b2,
                         std::optional<Tensor> residual, int64_t act, double act_p0, int64_t gate_fn, double gate_p0,
                         double gate_p1, int64_t squeeze, int64_t relu, bool channels_last, Tensor y,
                         std::optional<Tensor> gate, std::optional<Tensor> saved, std::optional<Tensor> mask,
                         Tensor workspace, std::optional<Tensor> counters, int64_t strategy, int64_t form,
                         int64_t samples, int64_t channels, int64_t positions, int64_t lanes, bool dependent_launch,
                         bool stream_stores) {
  check_place(x);
  check_codes(act, gate_fn, squeeze, relu);
  const CudaProblem p{check_problem(x, w1, channels_last, false), static_cast<Squeeze>(squeeze), relu == 1,
                      residual.has_value(), CudaNorm::none};
  const CudaPlan plan =
      plan_of(p, {strategy, form, samples, channels, positions, lanes, dependent_launch, stream_stores});
  ForwardCall call{};
  fill(call, p, plan, x);
  fill_weights(call, w1, w2, x);
  fill_functions(call, act, act_p0, gate_fn, gate_p0, gate_p1);
  call.b1 = any_vector(b1, "b1", {p.r}, x);
  call.b2 = any_vector(b2, "b2", {p.c}, x);
  if (residual.has_value()) call.residual = input(*residual, "residual", x, call, call.residual_stride);
  call.y = output(y, "y", x, call);
  const CudaWorkspace w = senet::workspace(p, plan, saved.has_value(), gate.has_value());
  float* memory = fill_workspace(call, w, workspace, counters, x);
  if (saved.has_value()) {
    fill_saved(call, *saved, x);
    call.parts_are_pooled = w.parts < 0;
  } else if (w.vector >= 0) {
    call.preact = memory + w.vector;
    call.preact_stride = p.r;
  }
  call.gate = w.gate >= 0 ? memory + w.gate : mutable_vector(gate, "gate", {p.n, p.c}, x);
  if (p.relu && mask.has_value() && mask->dim() > 1) {
    check_mask(*mask, p, x);
    call.mask = static_cast<uint8_t*>(mask->mutable_data_ptr());
  }
  if (p.n == 0) return;
  run(launch_squeeze(call));
  if (plan.strategy == CudaStrategy::launches) run(launch_excite(call));
  run(launch_scale(call));
}

void squeeze_excite_backward_cuda(Tensor dy, std::optional<Tensor> dgate, Tensor x, Tensor w1, Tensor w2, Tensor gate,
                                  Tensor saved, std::optional<Tensor> mask, int64_t act, double act_p0, int64_t gate_fn,
                                  double gate_p0, double gate_p1, int64_t squeeze, int64_t relu, bool channels_last,
                                  std::optional<Tensor> dx, std::optional<Tensor> dw1, std::optional<Tensor> db1,
                                  std::optional<Tensor> dw2, std::optional<Tensor> db2, std::optional<Tensor> dresidual,
                                  Tensor workspace, std::optional<Tensor> counters, int64_t strategy, int64_t form,
                                  int64_t samples, int64_t channels, int64_t positions, int64_t lanes,
                                  bool dependent_launch, bool stream_stores) {
  check_place(x);
  check_codes(act, gate_fn, squeeze, relu);
  const CudaProblem p{check_problem(x, w1, channels_last, true), static_cast<Squeeze>(squeeze), relu == 1,
                      dresidual.has_value(), CudaNorm::none};
  STD_TORCH_CHECK(p.n > 0, "senet_fused: an empty batch has no backward");
  STD_TORCH_CHECK(!dresidual.has_value() || p.relu, "senet_fused: without post_act dresidual is dy");
  const CudaPlan plan =
      plan_of(p, {strategy, form, samples, channels, positions, lanes, dependent_launch, stream_stores});
  BackwardCall call{};
  fill(call, p, plan, x);
  fill_weights(call, w1, w2, x);
  fill_functions(call, act, act_p0, gate_fn, gate_p0, gate_p1);
  call.dy = input(dy, "dy", x, call, call.dy_stride);
  call.dx = output(dx, "dx", x, call);
  call.dresidual = output(dresidual, "dresidual", x, call);
  call.dgate = vector(dgate, "dgate", {p.n, p.c}, x);
  call.gate = mutable_vector(gate, "gate", {p.n, p.c}, x);
  fill_saved(call, saved, x);
  if (p.relu) {
    STD_TORCH_CHECK(mask.has_value(), "senet_fused: a ReLU's backward needs its mask");
    check_mask(*mask, p, x);
    call.mask = static_cast<const uint8_t*>(mask->const_data_ptr());
  }
  const CudaWorkspace w = senet::workspace(p, plan, true, dx.has_value());
  float* memory = fill_workspace(call, w, workspace, counters, x);
  if (w.vector >= 0) call.dpreact = memory + w.vector;
  if (w.gate >= 0) call.dpooled = memory + w.gate;
  fill_weight_gradients(call, w1, dw1, db1, dw2, db2, x);
  run(launch_squeeze_backward(call));
  if (plan.strategy == CudaStrategy::launches) run(launch_excite_backward(call));
  run(launch_scale_backward(call));
}

std::string cuda_driver_problem() { return cuda::driver_problem(); }

}  // namespace senet
