// The second sweep of the forward.
#include "kernel/scale.cuh"
#include "launch.cuh"

namespace senet::cuda {

std::string launch_scale(const ForwardCall& call) {
  const CudaProblem& p = call.problem;
  const bool launches = call.plan.strategy == CudaStrategy::launches;
  ScaleArguments a{};
  a.g = geometry_of(call);
  a.by_m = Divisor::of(p.m);
  a.x = call.x;
  a.residual = call.residual;
  a.x_stride = call.x_stride;
  a.residual_stride = call.residual_stride;
  a.y = call.y;
  a.mask = call.mask;
  a.parts = launches || call.parts_are_pooled || call.pooled == nullptr ? nullptr : call.parts;
  a.pooled = call.pooled;
  a.pooled_stride = call.saved_stride;
  a.excite = bottleneck_of(call);
  a.gate = call.gate;
  a.strategy = call.plan.strategy;
  a.relu = p.relu;
  a.stream_stores = call.plan.stream_stores;
  return with_type(call.dtype, [&](auto type) {
    using T = decltype(type);
    if (p.channels_last)
      return launch_for(call, "scale_channels_last_kernel", scale_channels_last_kernel<T>, a, tiles_of(call), 0, false);
    return launch_for(call, "scale_planes_kernel", scale_planes_kernel<T>, a, tiles_of(call), 0, false);
  });
}

}  // namespace senet::cuda
