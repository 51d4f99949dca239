// The excitation's own launches, two each way.
#include "kernel/launches.cuh"
#include "launch.cuh"
#include "weights_of.cuh"

namespace senet::cuda {
namespace {

ExciteArguments arguments_of(const Call& call) {
  ExciteArguments a{};
  a.n = call.problem.n;
  a.splits = static_cast<int>(call.plan.splits);
  a.parts = call.parts;
  a.parts_stride = call.plan.splits * call.problem.c;
  a.squeeze = call.problem.squeeze;
  a.saved_stride = call.saved_stride;
  return a;
}

}  // namespace

std::string driver_problem() {
#ifndef SENET_ON_HOST
  int driver = 0, runtime = 0;
  if (const cudaError_t error = cudaDriverGetVersion(&driver); error != cudaSuccess)
    return std::string("the driver does not answer: ") + cudaGetErrorString(error);
  cudaRuntimeGetVersion(&runtime);
  if (driver / 1000 < runtime / 1000)
    return "the driver serves CUDA " + std::to_string(driver / 1000) + "." + std::to_string(driver % 1000 / 10) +
           ", the library was built with CUDA " + std::to_string(runtime / 1000) + "." +
           std::to_string(runtime % 1000 / 10) + " (update the driver, or reinstall with an older nvcc)";
#endif
  return "";
}

std::string launch_excite(const ForwardCall& call) {
  ExciteArguments a = arguments_of(call);
  a.peaks = call.peaks;
  a.ties = call.ties;
  if (call.parts_are_pooled) {
    a.parts = call.pooled;
    a.parts_stride = call.saved_stride;
  } else {
    a.pooled = call.pooled;
    a.peak = call.peak;
    a.tied = call.tied;
  }
  a.excite = bottleneck_of(call);
  const std::string error = launch_for(call, "excite_push_kernel", excite_push_kernel, a, patches_of(call), 0, false);
  return error.empty() ? launch_excite_gate(call) : error;
}

std::string launch_excite_gate(const ForwardCall& call) {
  ExciteArguments a = arguments_of(call);
  a.excite = bottleneck_of(call);
  a.out = call.gate;
  return launch_for(call, "excite_gate_kernel", excite_gate_kernel, a, patches_of(call), 0, false);
}

std::string launch_excite_push_backward(const BackwardCall& call) {
  ExciteArguments a = arguments_of(call);
  a.excite = bottleneck_of(call);
  return launch_for(call, "excite_push_backward_kernel", excite_push_backward_kernel, a, patches_of(call), 0, false);
}

std::string launch_excite_backward(const BackwardCall& call) {
  ExciteArguments a = arguments_of(call);
  a.excite = bottleneck_of(call);
  a.out = call.dpooled;
  a.weights = weights_of(call);
  a.weight_tiles = call.dw1 == nullptr ? 0 : static_cast<unsigned>(weight_tiles_of(call.problem));
  const int64_t blocks = a.weight_tiles + (call.dpooled == nullptr ? 0 : patches_of(call));
  if (blocks == 0) return "";
  const std::string error = launch_excite_push_backward(call);
  if (!error.empty()) return error;
  return launch_for(call, "excite_backward_kernel", excite_backward_kernel, a, blocks, 0, false);
}

}  // namespace senet::cuda
