// The second sweep of a block tail's forward.
#include "kernel/tail_apply.cuh"
#include "norm_of.cuh"

namespace senet::cuda {

std::string launch_tail_apply(const TailForwardCall& call, bool first) {
  const CudaProblem& p = call.problem;
  TailApplyArguments a{};
  a.g = geometry_of(call);
  a.by_m = Divisor::of(p.m);
  a.x = call.x;
  a.residual = call.residual;
  a.x_stride = call.x_stride;
  a.residual_stride = call.residual_stride;
  a.y = call.y;
  a.mask = call.mask;
  a.relu = p.relu;
  a.stream_stores = call.plan.stream_stores;
  a.norm = norm_of(call.norm, p);
  a.excite = bottleneck_of(call);
  a.gate = call.gate;
  a.strategy = call.plan.strategy;
  return with_type(call.dtype, [&](auto type) {
    using T = decltype(type);
    if (p.channels_last)
      return launch_for(call, "tail_apply_channels_last_kernel", tail_apply_channels_last_kernel<T>, a, tiles_of(call),
                        0, first);
    return launch_for(call, "tail_apply_planes_kernel", tail_apply_planes_kernel<T>, a, tiles_of(call), 0, first);
  });
}

}  // namespace senet::cuda
