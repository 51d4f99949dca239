// The first sweep of a block tail's forward.
#include "kernel/tail_moments.cuh"
#include "norm_of.cuh"

namespace senet::cuda {
namespace {

template <class T>
std::string launch_form(const TailForwardCall& call, const TailMomentsArguments& a) {
  const int64_t blocks = tiles_of(call);
  switch (call.plan.form) {
    case CudaForm::channels_last:
      return launch_for(call, "tail_moments_channels_last_kernel", tail_moments_channels_last_kernel<T>, a, blocks, 0,
                        true);
    case CudaForm::planes:
      return launch_for(call, "tail_moments_planes_kernel", tail_moments_planes_kernel<T>, a, blocks, 0, true);
    case CudaForm::tile_of_planes:
      return launch_for(call, "tail_moments_tile_of_planes_kernel", tail_moments_tile_of_planes_kernel<T>, a, blocks,
                        staged_bytes(call, 1), true);
  }
  return "unknown form";
}

}  // namespace

std::string launch_tail_moments(const TailForwardCall& call) {
  TailMomentsArguments a{};
  a.g = geometry_of(call);
  a.x = call.x;
  a.x_stride = call.x_stride;
  a.given = vector_of(call.norm.mean);
  a.inv_m = inverse(static_cast<double>(call.problem.m));
  a.shifts = call.shifts;
  a.means = call.means;
  a.squares = call.squares;
  return with_type(call.dtype, [&](auto type) { return launch_form<decltype(type)>(call, a); });
}

}  // namespace senet::cuda
