// The second sweep of the backward, with the weight gradients where no launch between the sweeps makes them.
#include "kernel/scale_backward.cuh"
#include "launch.cuh"
#include "weights_of.cuh"

namespace senet::cuda {
namespace {

template <class T, bool kPeak>
std::string launch_form(const BackwardCall& call, const ScaleBackwardArguments& a, int64_t blocks) {
  if (call.problem.channels_last)
    return launch_for(call, "scale_backward_channels_last_kernel", scale_backward_channels_last_kernel<T, kPeak>, a,
                      blocks, 0, false);
  return launch_for(call, "scale_backward_planes_kernel", scale_backward_planes_kernel<T, kPeak>, a, blocks, 0, false);
}

}  // namespace

std::string launch_scale_backward(const BackwardCall& call) {
  const CudaProblem& p = call.problem;
  const bool launches = call.plan.strategy == CudaStrategy::launches;
  ScaleBackwardArguments a{};
  a.g = geometry_of(call);
  a.by_m = Divisor::of(p.m);
  a.x = call.x;
  a.dy = call.dy;
  a.x_stride = call.x_stride;
  a.dy_stride = call.dy_stride;
  a.mask = call.mask;
  a.gate = call.gate;
  a.dx = call.dx;
  a.dresidual = call.dresidual;
  a.excite = bottleneck_of(call);
  a.dpreact = call.dpreact;
  a.dpooled = call.dpooled;
  a.peaks = call.peak;
  a.ties = call.tied;
  a.peaks_stride = call.saved_stride;
  a.inv_m = static_cast<float>(1.0 / static_cast<double>(p.m));
  a.half = p.squeeze == Squeeze::avgmax;
  a.stream_stores = call.plan.stream_stores;
  a.strategy = call.plan.strategy;
  a.weights = weights_of(call);
  a.weight_tiles = call.dw1 == nullptr || launches ? 0 : static_cast<unsigned>(weight_tiles_of(p));
  const bool sweep = call.dx != nullptr || call.dresidual != nullptr;
  const int64_t blocks = a.weight_tiles + (sweep ? tiles_of(call) : 0);
  if (blocks == 0) return "";
  return with_type(call.dtype, [&](auto type) {
    using T = decltype(type);
    return p.squeeze == Squeeze::avg ? launch_form<T, false>(call, a, blocks) : launch_form<T, true>(call, a, blocks);
  });
}

}  // namespace senet::cuda
