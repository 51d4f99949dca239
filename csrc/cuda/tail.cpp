#include "tail.h"

#include "arguments.h"

namespace senet {
namespace {

using cuda::TailBackwardCall;
using cuda::TailForwardCall;
using cuda::TailNorm;

enum class Stages : int64_t { all, first, rest };

Stages stages_of(int64_t stages) {
  STD_TORCH_CHECK(stages >= 0 && stages <= 2, "senet_fused: stages must be 0, 1 or 2, got ", stages);
  return static_cast<Stages>(stages);
}

CudaProblem problem_of(const Tensor& x, const std::optional<Tensor>& w1, const std::optional<Tensor>& w2, CudaNorm norm,
                       int64_t relu, bool residual, bool channels_last, bool backward) {
  STD_TORCH_CHECK(w1.has_value() == w2.has_value(), "senet_fused: w1 and w2 go together");
  CudaProblem p{check_problem(x, w1, channels_last, backward), Squeeze::avg, relu == 1, residual, norm};
  STD_TORCH_CHECK(p.n > 0, "senet_fused: an empty batch has no statistics");
  if (!w1.has_value()) p.weight_size = p.element_size;
  return p;
}

// As plan_of; a tail's samples and splits are counted in 32 bits, too.
CudaPlan tail_plan_of(const CudaProblem& p, const PlanNumbers& given) {
  const CudaPlan plan = plan_of(p, given);
  STD_TORCH_CHECK(p.n <= ((int64_t{1} << 31) - 4096) / plan.splits, "senet_fused: ", p.n, " samples of ", plan.splits,
                  " splits are more than a block tail takes; split the batch");
  return plan;
}

void fill_norm(TailNorm& norm, const CudaProblem& p, const std::optional<Tensor>& weight,
               const std::optional<Tensor>& bias, const std::optional<Tensor>& factor, const Tensor& statistics,
               const Tensor& x) {
  norm.weight = any_vector(weight, "weight", {p.c}, x);
  norm.bias = any_vector(bias, "bias", {p.c}, x);
  norm.factor = any_vector(factor, "factor", {p.n}, x);
  norm.statistics = mutable_vector(statistics, "statistics", {3, p.c}, x);
}

void fill_gate(Call& call, const std::optional<Tensor>& w1, const std::optional<Tensor>& w2,
               const std::optional<Tensor>& gate, const std::optional<Tensor>& saved, const Tensor& x) {
  STD_TORCH_CHECK(gate.has_value() == w1.has_value() && saved.has_value() == w1.has_value(),
                  "senet_fused: w1, gate and saved go together");
  if (!w1.has_value()) return;
  fill_weights(call, *w1, *w2, x);
  call.gate = mutable_vector(gate, "gate", {call.problem.n, call.problem.c}, x);
  fill_saved(call, *saved, x);
}

}  // namespace

void tail_forward_cuda(Tensor x, std::optional<Tensor> weight, std::optional<Tensor> bias, Tensor statistics,
                       std::optional<Tensor> mean, std::optional<Tensor> var, std::optional<Tensor> w1,
                       std::optional<Tensor> b1, std::optional<Tensor> w2, std::optional<Tensor> b2,
                       std::optional<Tensor> residual, std::optional<Tensor> factor, double eps, int64_t act,
                       double act_p0, int64_t gate_fn, double gate_p0, double gate_p1, int64_t squeeze, int64_t relu,
                       bool channels_last, Tensor y, std::optional<Tensor> gate, std::optional<Tensor> saved,
                       std::optional<Tensor> mask, int64_t stages, Tensor workspace, std::optional<Tensor> counters,
                       int64_t strategy, int64_t form, int64_t samples, int64_t channels, int64_t positions,
                       int64_t lanes, bool dependent_launch, bool stream_stores) {
  check_place(x);
  check_codes(act, gate_fn, squeeze, relu);
  const Stages wanted = stages_of(stages);
  const bool given = mean.has_value();
  STD_TORCH_CHECK(var.has_value() == given, "senet_fused: mean and var go together");
  const CudaProblem p = problem_of(x, w1, w2, given ? CudaNorm::given : CudaNorm::batch, relu, residual.has_value(),
                                   channels_last, false);
  TailForwardCall call{};
  fill(call, p, tail_plan_of(p, {strategy, form, samples, channels, positions, lanes, dependent_launch, stream_stores}),
       x);
  fill_functions(call, act, act_p0, gate_fn, gate_p0, gate_p1);
  fill_gate(call, w1, w2, gate, saved, x);
  fill_norm(call.norm, p, weight, bias, factor, statistics, x);
  call.norm.mean = any_vector(mean, "mean", {p.c}, x);
  call.norm.var = any_vector(var, "var", {p.c}, x);
  call.norm.eps = static_cast<float>(eps);
  call.b1 = any_vector(b1, "b1", {p.r}, x);
  call.b2 = any_vector(b2, "b2", {p.c}, x);
  if (residual.has_value()) call.residual = input(*residual, "residual", x, call, call.residual_stride);
  call.y = output(y, "y", x, call);
  if (p.relu && mask.has_value()) {
    check_mask(*mask, p, x);
    call.mask = static_cast<uint8_t*>(mask->mutable_data_ptr());
  }
  const CudaTailWorkspace w = tail_workspace(p, call.plan);
  float* memory = workspace_of(workspace, w.size, x);
  call.shifts = at(memory, w.shifts);
  call.means = at(memory, w.means);
  call.squares = at(memory, w.squares);
  call.shares = at(memory, w.shares);
  fill_counters(call, counters, x);

  const bool gated = p.r > 0, batch = !given;
  const bool merges = batch && wanted != Stages::rest, pushes = gated && wanted != Stages::first;
  if (wanted != Stages::rest && (gated || batch)) run(launch_tail_moments(call));
  if (merges || pushes) run(launch_tail_excite(call, merges, pushes, wanted == Stages::rest));
  if (wanted == Stages::first) return;
  if (gated && call.plan.strategy == CudaStrategy::launches) run(launch_excite_gate(call));
  // With nothing in front of it, or what another process had to say, it is the first.
  run(launch_tail_apply(call, !pushes && !merges));
}

void tail_backward_cuda(Tensor dy, Tensor x, std::optional<Tensor> mask, std::optional<Tensor> weight,
                        std::optional<Tensor> bias, Tensor statistics, std::optional<Tensor> w1,
                        std::optional<Tensor> w2, std::optional<Tensor> factor, std::optional<Tensor> gate,
                        std::optional<Tensor> saved, int64_t act, double act_p0, int64_t gate_fn, double gate_p0,
                        double gate_p1, int64_t squeeze, int64_t relu, bool channels_last, double count,
                        std::optional<Tensor> shared_dweight, std::optional<Tensor> shared_dbias,
                        std::optional<Tensor> dx, std::optional<Tensor> dweight, std::optional<Tensor> dbias,
                        std::optional<Tensor> dw1, std::optional<Tensor> db1, std::optional<Tensor> dw2,
                        std::optional<Tensor> db2, std::optional<Tensor> dresidual, int64_t stages, Tensor workspace,
                        std::optional<Tensor> counters, int64_t strategy, int64_t form, int64_t samples,
                        int64_t channels, int64_t positions, int64_t lanes, bool dependent_launch, bool stream_stores) {
  check_place(x);
  check_codes(act, gate_fn, squeeze, relu);
  const Stages wanted = stages_of(stages);
  const bool batch = count > 0, rest = wanted == Stages::rest;
  const CudaProblem p = problem_of(x, w1, w2, batch ? CudaNorm::batch : CudaNorm::given, relu, dresidual.has_value(),
                                   channels_last, true);
  STD_TORCH_CHECK(!dresidual.has_value() || p.relu, "senet_fused: without post_act dresidual is dy");
  STD_TORCH_CHECK(!p.relu || mask.has_value(), "senet_fused: a ReLU's backward needs its mask");
  STD_TORCH_CHECK(shared_dweight.has_value() == rest && shared_dbias.has_value() == rest,
                  "senet_fused: shared_dweight and shared_dbias go with stages = 2");
  TailBackwardCall call{};
  fill(call, p, tail_plan_of(p, {strategy, form, samples, channels, positions, lanes, dependent_launch, stream_stores}),
       x);
  fill_functions(call, act, act_p0, gate_fn, gate_p0, gate_p1);
  fill_gate(call, w1, w2, gate, saved, x);
  fill_norm(call.norm, p, weight, bias, factor, statistics, x);
  fill_weight_gradients(call, w1, dw1, db1, dw2, db2, x);
  call.count = rest ? 1.0 : count;
  call.dy = input(dy, "dy", x, call, call.dy_stride);
  call.dx = output(dx, "dx", x, call);
  call.dresidual = output(dresidual, "dresidual", x, call);
  call.dweight = vector_out(dweight, "dweight", {p.c}, x);
  call.dbias = vector_out(dbias, "dbias", {p.c}, x);
  if (p.relu) {
    check_mask(*mask, p, x);
    call.mask = static_cast<const uint8_t*>(mask->const_data_ptr());
  }
  const CudaTailWorkspace w = tail_workspace(p, call.plan);
  float* memory = workspace_of(workspace, w.size, x);
  call.sums = at(memory, w.sums);
  call.parts = at(memory, w.dlogit);
  call.shares = at(memory, w.shares);
  call.dpreact = at(memory, w.dpreact);
  call.dpooled = at(memory, w.dpooled);
  call.groups = (p.n + kMaxSamples - 1) / kMaxSamples;
  call.parts_weight = at(memory, w.parts);
  call.parts_bias = call.parts_weight + call.groups * p.c;
  fill_counters(call, counters, x);

  const bool gated = p.r > 0, of_vectors = dweight.has_value() || dbias.has_value();
  const bool sums = !rest && (of_vectors || call.dw1 != nullptr || (call.dx != nullptr && (batch || gated)));
  if (sums) {
    run(launch_tail_sums(call));
    if (gated && call.plan.strategy == CudaStrategy::launches) run(launch_excite_push_backward(call));
    run(launch_tail_excite_backward(call));
  } else {
    call.parts_weight = mutable_vector(shared_dweight, "shared_dweight", {p.c}, x);
    call.parts_bias = mutable_vector(shared_dbias, "shared_dbias", {p.c}, x);
    call.groups = 1;
    if (rest) call.dweight = call.dbias = {};
  }
  if (wanted == Stages::first) call.dx = call.dresidual = nullptr;
  if (call.dx != nullptr || call.dresidual != nullptr || (of_vectors && !rest))
    run(launch_tail_apply_backward(call, !sums));
}

}  // namespace senet
