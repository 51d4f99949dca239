// The first sweep of the forward.
#include "kernel/squeeze.cuh"
#include "launch.cuh"

namespace senet::cuda {
namespace {

template <class T, bool kPeak>
std::string launch_form(const ForwardCall& call, const SqueezeArguments& a) {
  const int64_t blocks = tiles_of(call);
  switch (call.plan.form) {
    case CudaForm::channels_last:
      return launch_for(call, "squeeze_channels_last_kernel", squeeze_channels_last_kernel<T, kPeak>, a, blocks, 0,
                        true);
    case CudaForm::planes:
      return launch_for(call, "squeeze_planes_kernel", squeeze_planes_kernel<T, kPeak>, a, blocks, 0, true);
    case CudaForm::tile_of_planes:
      return launch_for(call, "squeeze_tile_of_planes_kernel", squeeze_tile_of_planes_kernel<T, kPeak>, a, blocks,
                        staged_bytes(call, 1), true);
  }
  return "unknown form";
}

}  // namespace

std::string launch_squeeze(const ForwardCall& call) {
  SqueezeArguments a{};
  a.g = geometry_of(call);
  a.x = call.x;
  a.x_stride = call.x_stride;
  a.inv_m = static_cast<float>(1.0 / static_cast<double>(call.problem.m));
  a.parts = call.parts_are_pooled ? call.pooled : call.parts;
  a.parts_stride = call.parts_are_pooled ? call.saved_stride : call.plan.splits * call.problem.c;
  a.peaks = call.peaks;
  a.ties = call.ties;
  a.excite = bottleneck_of(call);
  if (call.plan.strategy == CudaStrategy::launches) a.excite.shares = nullptr;
  a.counters = call.counters;
  return with_type(call.dtype, [&](auto type) {
    using T = decltype(type);
    return call.problem.squeeze == Squeeze::avg ? launch_form<T, false>(call, a) : launch_form<T, true>(call, a);
  });
}

}  // namespace senet::cuda
