// The first sweep of a block tail's backward.
#include "kernel/tail_sums.cuh"
#include "norm_of.cuh"

namespace senet::cuda {
namespace {

template <class T>
std::string launch_form(const TailBackwardCall& call, const TailSumsArguments& a) {
  const int64_t blocks = tiles_of(call);
  switch (call.plan.form) {
    case CudaForm::channels_last:
      return launch_for(call, "tail_sums_channels_last_kernel", tail_sums_channels_last_kernel<T>, a, blocks, 0, true);
    case CudaForm::planes:
      return launch_for(call, "tail_sums_planes_kernel", tail_sums_planes_kernel<T>, a, blocks, 0, true);
    case CudaForm::tile_of_planes:
      return launch_for(call, "tail_sums_tile_of_planes_kernel", tail_sums_tile_of_planes_kernel<T>, a, blocks,
                        staged_bytes(call, 2), true);
  }
  return "unknown form";
}

}  // namespace

std::string launch_tail_sums(const TailBackwardCall& call) {
  TailSumsArguments a{};
  a.g = geometry_of(call);
  a.x = call.x;
  a.dy = call.dy;
  a.x_stride = call.x_stride;
  a.dy_stride = call.dy_stride;
  a.mask = call.mask;
  a.norm = norm_of(call.norm, call.problem);
  a.gate = call.gate;
  a.g0 = call.sums;
  a.g1 = call.sums + call.problem.n * call.plan.splits * call.problem.c;
  a.dlogit = call.parts;
  a.excite = bottleneck_of(call);
  if (call.plan.strategy == CudaStrategy::launches) a.excite.shares = nullptr;
  a.dpreact = call.dpreact;
  a.counters = call.counters;
  return with_type(call.dtype, [&](auto type) { return launch_form<decltype(type)>(call, a); });
}

}  // namespace senet::cuda
