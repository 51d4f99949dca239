// The second sweep of a block tail's backward; where no gradient of a tensor is wanted, the tiles that store those of
// BatchNorm's weights alone.
#include "kernel/tail_apply_backward.cuh"
#include "norm_of.cuh"

namespace senet::cuda {

std::string launch_tail_apply_backward(const TailBackwardCall& call, bool first) {
  const CudaProblem& p = call.problem;
  TailApplyBackwardArguments a{};
  a.g = geometry_of(call);
  a.by_m = Divisor::of(p.m);
  a.x = call.x;
  a.dy = call.dy;
  a.x_stride = call.x_stride;
  a.dy_stride = call.dy_stride;
  a.mask = call.mask;
  a.dx = call.dx;
  a.dresidual = call.dresidual;
  a.stream_stores = call.plan.stream_stores;
  a.centred = p.norm == CudaNorm::batch && call.dx != nullptr;
  a.norm = norm_of(call.norm, p);
  a.gate = call.gate;
  a.dpooled = call.dpooled;
  a.parts_weight = call.parts_weight;
  a.parts_bias = call.parts_bias;
  a.groups = call.groups;
  a.dweight = target_of(call.dweight);
  a.dbias = target_of(call.dbias);
  a.inv_m = inverse(static_cast<double>(p.m));
  a.inv_count = call.count > 0 ? inverse(call.count) : 0.0f;
  const bool sweep = call.dx != nullptr || call.dresidual != nullptr;
  const int64_t blocks = sweep ? tiles_of(call) : call.plan.blocks(p.c);
  return with_type(call.dtype, [&](auto type) {
    using T = decltype(type);
    if (p.channels_last)
      return launch_for(call, "tail_apply_backward_channels_last_kernel", tail_apply_backward_channels_last_kernel<T>,
                        a, blocks, 0, first);
    return launch_for(call, "tail_apply_backward_planes_kernel", tail_apply_backward_planes_kernel<T>, a, blocks, 0,
                      first);
  });
}

}  // namespace senet::cuda
