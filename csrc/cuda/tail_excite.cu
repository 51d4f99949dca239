// What a block tail launches between its sweeps, both ways; with the "launches" strategy a launch of the SE layer's
// excitation joins it.
#include "kernel/tail_excite.cuh"
#include "kernel/tail_excite_backward.cuh"
#include "norm_of.cuh"
#include "weights_of.cuh"

namespace senet::cuda {

std::string launch_tail_excite(const TailForwardCall& call, bool merges, bool pushes, bool first) {
  const CudaProblem& p = call.problem;
  const double count = static_cast<double>(p.n) * static_cast<double>(p.m);
  TailExciteArguments a{};
  a.n = p.n;
  a.splits = static_cast<int>(call.plan.splits);
  a.positions = static_cast<int>(call.plan.positions);
  a.m = static_cast<int>(p.m);
  a.shifts = call.shifts;
  a.means = call.means;
  a.squares = call.squares;
  a.wide = p.c % 4 == 0;
  a.norm = norm_of(call.norm, p);
  a.merges = merges;
  a.pushes = pushes;
  a.inv_m = inverse(static_cast<double>(p.m));
  a.inv_count = inverse(count);
  a.inv_less_one = count > 1 ? inverse(count - 1) : 0.0f;
  a.pooled = call.pooled;
  a.saved_stride = call.saved_stride;
  a.excite = bottleneck_of(call);
  a.counters = call.counters;
  const int64_t blocks = (p.c + kTailChannels - 1) / kTailChannels * (pushes ? groups_of(call) : 1);
  return launch_for(call, "tail_excite_kernel", tail_excite_kernel, a, blocks, 0, first);
}

std::string launch_tail_excite_backward(const TailBackwardCall& call) {
  const CudaProblem& p = call.problem;
  TailExciteBackwardArguments a{};
  a.n = p.n;
  a.splits = static_cast<int>(call.plan.splits);
  a.norm = norm_of(call.norm, p);
  a.g0 = call.sums;
  a.g1 = call.sums + p.n * call.plan.splits * p.c;
  a.gate = call.gate;
  a.pooled = call.pooled;
  a.saved_stride = call.saved_stride;
  a.excite = bottleneck_of(call);
  a.dpreact = call.dpreact;
  a.dpooled = call.dpooled;
  a.parts_weight = call.parts_weight;
  a.parts_bias = call.parts_bias;
  a.weights = weights_of(call);
  a.weights.affine = true;
  a.weights.scale = vector_of(call.norm.weight);
  a.weights.shift = vector_of(call.norm.bias);
  a.weight_tiles = call.dw1 == nullptr ? 0 : static_cast<unsigned>(weight_tiles_of(p));
  return launch_for(call, "tail_excite_backward_kernel", tail_excite_backward_kernel, a,
                    a.weight_tiles + patches_of(call), 0, false);
}

}  // namespace senet::cuda
