// The first sweep of the backward.
#include "kernel/squeeze_backward.cuh"
#include "launch.cuh"

namespace senet::cuda {
namespace {

template <class T>
std::string launch_form(const BackwardCall& call, const SqueezeBackwardArguments& a) {
  const int64_t blocks = tiles_of(call);
  switch (call.plan.form) {
    case CudaForm::channels_last:
      return launch_for(call, "squeeze_backward_channels_last_kernel", squeeze_backward_channels_last_kernel<T>, a,
                        blocks, 0, true);
    case CudaForm::planes:
      return launch_for(call, "squeeze_backward_planes_kernel", squeeze_backward_planes_kernel<T>, a, blocks, 0, true);
    case CudaForm::tile_of_planes:
      return launch_for(call, "squeeze_backward_tile_of_planes_kernel", squeeze_backward_tile_of_planes_kernel<T>, a,
                        blocks, staged_bytes(call, 2), true);
  }
  return "unknown form";
}

}  // namespace

std::string launch_squeeze_backward(const BackwardCall& call) {
  SqueezeBackwardArguments a{};
  a.g = geometry_of(call);
  a.x = call.x;
  a.dy = call.dy;
  a.x_stride = call.x_stride;
  a.dy_stride = call.dy_stride;
  a.mask = call.mask;
  a.dgate = call.dgate;
  a.gate = call.gate;
  a.parts = call.parts;
  a.excite = bottleneck_of(call);
  if (call.plan.strategy == CudaStrategy::launches) a.excite.shares = nullptr;
  a.dpreact = call.dpreact;
  a.counters = call.counters;
  return with_type(call.dtype, [&](auto type) { return launch_form<decltype(type)>(call, a); });
}

}  // namespace senet::cuda
