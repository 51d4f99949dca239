// From a call to a kernel's launch: what all launches share.
#pragma once
#include <cstdint>
#include <string>

#include "call.h"
#include "kernel/excite.cuh"

#ifndef SENET_ON_HOST
#include <cuda_runtime.h>

#include <array>
#include <atomic>
#endif

namespace senet::cuda {

#ifndef SENET_ON_HOST

// Makes a device the current one; the one before is current again afterwards.
class OnDevice {
 public:
  explicit OnDevice(int device) : error_(cudaGetDevice(&before_)) {
    if (error_ == cudaSuccess && before_ != device)
      error_ = cudaSetDevice(device);
    else
      before_ = -1;
  }
  ~OnDevice() {
    if (before_ >= 0) cudaSetDevice(before_);
  }
  cudaError_t error() const { return error_; }

 private:
  int before_ = -1;
  cudaError_t error_;
};

// Whether the code that runs on a device is compiled for sm_90 or later: earlier code does not wait for the launch in
// front of it (PTX for sm_80 runs on every later GPU). All kernels are compiled for the same architectures, and the
// answer takes longer than a launch, so it is asked for once.
inline cudaError_t code_waits(const void* kernel, int device, bool& waits) {
  static std::array<std::atomic<int>, 64> known{};  // 0: not asked yet, 1: no, 2: yes
  const auto place = static_cast<size_t>(device);
  int answer = place < known.size() ? known[place].load(std::memory_order_relaxed) : 0;
  if (answer == 0) {
    cudaFuncAttributes attributes{};
    if (const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel); error != cudaSuccess) return error;
    answer = attributes.ptxVersion >= 90 ? 2 : 1;
    if (place < known.size()) known[place].store(answer, std::memory_order_relaxed);
  }
  waits = answer == 2;
  return cudaSuccess;
}

// Launches kernel(arguments); returns an empty text, or what went wrong. dependent: the kernel may begin before the
// launch in front of it has ended.
template <class Arguments>
std::string launch(const char* name, void (*kernel)(Arguments), const Arguments& arguments, int64_t blocks, int threads,
                   size_t shared_bytes, bool dependent, void* stream, int device) {
  const OnDevice on_device(device);
  cudaError_t error = on_device.error();
  bool early = false;
  if (error == cudaSuccess && dependent) error = code_waits(reinterpret_cast<const void*>(kernel), device, early);
  if (error == cudaSuccess) {
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = &attribute;
    config.numAttrs = early ? 1 : 0;
    error = cudaLaunchKernelEx(&config, kernel, arguments);
  }
  if (error == cudaSuccess) return "";
  cudaGetLastError();  // it is reported here; the next launch is not to find it
  return std::string(cudaGetErrorName(error)) + ": " + cudaGetErrorString(error);
}

#endif

inline Geometry geometry_of(const Call& call) {
  const CudaProblem& p = call.problem;
  const CudaPlan& plan = call.plan;
  const auto narrow = [](int64_t v) { return static_cast<int>(v); };
  return {p.n,
          narrow(p.c),
          narrow(p.r),
          narrow(p.m),
          narrow(plan.samples),
          narrow(plan.channels),
          narrow(plan.positions),
          narrow(plan.splits),
          narrow(plan.blocks(p.c)),
          narrow(plan.lanes),
          call.wide};
}

inline int64_t tiles_of(const Call& call) {
  return (call.problem.n + call.plan.samples - 1) / call.plan.samples * call.plan.tiles(call.problem.c);
}

// Blocks of the excitation's own launches; of kMaxSamples samples each.
inline int64_t groups_of(const Call& call) { return (call.problem.n + kMaxSamples - 1) / kMaxSamples; }
inline int64_t patches_of(const Call& call) {
  return groups_of(call) * ((call.problem.c + kExciteChannels - 1) / kExciteChannels);
}

inline int64_t weight_tiles_of(const CudaProblem& p) {
  return (p.c + kWeightChannels - 1) / kWeightChannels * ((p.r + kWeightReduced - 1) / kWeightReduced);
}

inline Vector vector_of(const VectorIn& v) { return {v.data, static_cast<Type>(v.dtype)}; }
inline Target target_of(const VectorOut& v) { return {v.data, static_cast<Type>(v.dtype)}; }

inline Bottleneck bottleneck_of(const Call& call) {
  const CudaProblem& p = call.problem;
  const auto matrix = [&](const void* data, int64_t row) {
    const bool wide = row % 4 == 0 && reinterpret_cast<uintptr_t>(data) % 16 == 0;
    return Matrix{data, static_cast<Type>(call.weight_dtype), wide};
  };
  Bottleneck b{};
  b.c = static_cast<int>(p.c);
  b.r = static_cast<int>(p.r);
  b.w1 = matrix(call.w1, p.c);
  b.w2 = matrix(call.w2, p.r);
  b.act = {call.act, call.act_p0, 0.0f};
  b.gate = {call.gate_fn, call.gate_p0, call.gate_p1};
  b.shares = call.shares;
  b.tiles = static_cast<int>(shares_of_sample(p, call.plan));
  b.preact = call.preact;
  b.preact_stride = call.preact_stride;
  return b;
}

inline Bottleneck bottleneck_of(const ForwardCall& call) {
  Bottleneck b = bottleneck_of(static_cast<const Call&>(call));
  b.b1 = vector_of(call.b1);
  b.b2 = vector_of(call.b2);
  return b;
}

// Bytes of dynamic shared memory for `tensors` tiles of planes, each a multiple of 16 bytes.
inline size_t staged_bytes(const Call& call, int tensors) {
  const int64_t elements = (call.plan.channels * call.problem.m + kCudaPack - 1) / kCudaPack * kCudaPack;
  return static_cast<size_t>(tensors * elements * call.problem.element_size);
}

// launch(), with the kernel's name and its plan in front of what went wrong.
template <class Arguments>
std::string launch_for(const Call& call, const char* name, void (*kernel)(Arguments), const Arguments& arguments,
                       int64_t blocks, size_t shared_bytes, bool first) {
  const std::string error = launch(name, kernel, arguments, blocks, static_cast<int>(kCudaThreads), shared_bytes,
                                   !first && call.plan.dependent_launch, call.stream, call.device);
  if (error.empty()) return error;
  return std::string(name) + " of " + std::to_string(blocks) + " blocks (" + text(call.plan) + "): " + error;
}

// f(a value of x's element type)
template <class F>
std::string with_type(Dtype dtype, F f) {
  if (dtype == Dtype::float32) return f(float());
  if (dtype == Dtype::bfloat16) return f(__nv_bfloat16());
  return f(__half());
}

}  // namespace senet::cuda
