// From an operator's arguments, checked, to a call: what the CUDA operators have in common.
#pragma once
#include <dlfcn.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>
#include <string>

#include "../check.h"
#include "call.h"

namespace senet {

using cuda::BackwardCall;
using cuda::Call;
using cuda::Dtype;
using cuda::ForwardCall;

#ifdef SENET_ON_HOST
// The kernels run on the host, on CPU tensors.
inline void check_place(const Tensor& x) { STD_TORCH_CHECK(x.is_cpu(), "senet_fused: x must be on the CPU"); }
inline void* current_stream(int) { return nullptr; }
#else
inline void check_place(const Tensor& x) { STD_TORCH_CHECK(x.is_cuda(), "senet_fused: x must be on a GPU"); }

// PyTorch's current stream. The function is in a library that only a PyTorch with CUDA has; so it is looked up when it
// is needed, and this library loads without it.
inline void* current_stream(int device) {
  using Get = AOTITorchError (*)(int32_t, void**);
  static const auto get = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library == nullptr ? nullptr : reinterpret_cast<Get>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
  }();
  STD_TORCH_CHECK(get != nullptr, "senet_fused: this PyTorch has no CUDA (no aoti_torch_get_current_cuda_stream)");
  void* stream = nullptr;
  STD_TORCH_CHECK(get(device, &stream) == 0, "senet_fused: PyTorch gives no current stream for device ", device);
  return stream;
}
#endif

inline Dtype dtype_of(const Tensor& t, const char* name) {
  const ScalarType type = t.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half,
                  "senet_fused: ", name, " must be float32, bfloat16 or float16");
  return type == ScalarType::Float ? Dtype::float32 : type == ScalarType::BFloat16 ? Dtype::bfloat16 : Dtype::float16;
}

struct PlanNumbers {
  int64_t strategy, form, samples, channels, positions, lanes;
  bool dependent_launch, stream_stores;
};

inline CudaPlan plan_of(const CudaProblem& p, const PlanNumbers& given) {
  // Loops count in 32 bits, and look a few thousand positions ahead.
  constexpr int64_t kLimit = (int64_t{1} << 31) - 4096;
  STD_TORCH_CHECK(p.c < kLimit && p.r < kLimit && p.m < kLimit, "senet_fused: the CUDA kernels take less than ", kLimit,
                  " channels, squeezed channels and positions");
  STD_TORCH_CHECK(given.strategy >= 0 && given.strategy < kCudaStrategies && given.form >= 0 &&
                      given.form < kCudaForms && given.positions >= 1,
                  "senet_fused: unknown plan");
  CudaPlan plan{};
  plan.strategy = static_cast<CudaStrategy>(given.strategy);
  plan.form = static_cast<CudaForm>(given.form);
  plan.samples = given.samples;
  plan.channels = given.channels;
  plan.positions = given.positions;
  plan.splits = (p.m + given.positions - 1) / given.positions;
  plan.lanes = given.lanes;
  plan.dependent_launch = given.dependent_launch;
  plan.stream_stores = given.stream_stores;
  const std::string problem = misfit(p, plan);
  STD_TORCH_CHECK(problem.empty(), "senet_fused: a plan that does not fit (", text(plan), "): ", problem);
  const int64_t groups = (p.n + plan.samples - 1) / plan.samples;
  STD_TORCH_CHECK(groups <= kLimit / plan.tiles(p.c) - 1 - p.c, "senet_fused: ", groups, " groups of samples of ",
                  plan.tiles(p.c), " tiles each are more blocks than one launch can have; split the batch");
  return plan;
}

// Whether 16 bytes can be read at a time: `wide` says it of the layout, this of a tensor.
inline bool is_wide(const void* data, int64_t stride, const CudaProblem& p) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && (p.n <= 1 || stride * p.element_size % 16 == 0);
}

inline bool is_wide(const CudaProblem& p, const CudaPlan& plan) {
  if (plan.form == CudaForm::channels_last) return p.c * p.element_size % 16 == 0;
  return plan.form == CudaForm::planes || plan.blocks(p.c) == 1 || plan.channels * p.m * p.element_size % 16 == 0;
}

inline void fill(Call& call, const CudaProblem& p, const CudaPlan& plan, const Tensor& x) {
  call.problem = p;
  call.plan = plan;
  call.dtype = dtype_of(x, "x");
  call.x_stride = check_samples(x, "x", p.channels_last);
  call.x = x.const_data_ptr();
  call.wide = is_wide(p, plan) && is_wide(call.x, call.x_stride, p);
  call.device = x.get_device_index();
  call.stream = current_stream(call.device);
}

inline void fill_weights(Call& call, const Tensor& w1, const Tensor& w2, const Tensor& x) {
  const CudaProblem& p = call.problem;
  check_dense(w1, "w1", {p.r, p.c}, w1.scalar_type(), x);
  check_dense(w2, "w2", {p.c, p.r}, w1.scalar_type(), x);
  call.weight_dtype = dtype_of(w1, "w1");
  call.w1 = w1.const_data_ptr();
  call.w2 = w2.const_data_ptr();
}

inline void fill_functions(Call& call, int64_t act, double act_p0, int64_t gate_fn, double gate_p0, double gate_p1) {
  call.act = static_cast<Function>(act);
  call.gate_fn = static_cast<Function>(gate_fn);
  call.act_p0 = static_cast<float>(act_p0);
  call.gate_p0 = static_cast<float>(gate_p0);
  call.gate_p1 = static_cast<float>(gate_p1);
}

// The workspace's first float.
inline float* workspace_of(const Tensor& memory, int64_t size, const Tensor& x) {
  STD_TORCH_CHECK(memory.dim() == 1 && memory.size(0) >= size, "senet_fused: workspace must have ", size,
                  " elements, got ", text(memory));
  check_dense(memory, "workspace", {memory.size(0)}, ScalarType::Float, x);
  auto* first = static_cast<float*>(memory.mutable_data_ptr());
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(first) % 16 == 0, "senet_fused: workspace must be aligned to 16 bytes");
  return first;
}

inline float* at(float* workspace, int64_t offset) { return offset < 0 ? nullptr : workspace + offset; }

inline void fill_counters(Call& call, const std::optional<Tensor>& counters, const Tensor& x) {
  const int64_t groups = counted_groups(call.problem, call.plan);
  if (groups == 0) return;
  STD_TORCH_CHECK(counters.has_value() && counters->dim() == 1 && counters->size(0) >= groups,
                  "senet_fused: this plan needs ", groups, " counters");
  check_dense(*counters, "counters", {counters->size(0)}, ScalarType::Int, x);
  call.counters = static_cast<int*>(counters->mutable_data_ptr());
}

inline const float* vector(const std::optional<Tensor>& t, const char* name, std::initializer_list<int64_t> sizes,
                           const Tensor& x) {
  if (!t.has_value()) return nullptr;
  check_dense(*t, name, sizes, ScalarType::Float, x);
  return static_cast<const float*>(t->const_data_ptr());
}

inline float* mutable_vector(const std::optional<Tensor>& t, const char* name, std::initializer_list<int64_t> sizes,
                             const Tensor& x) {
  return const_cast<float*>(vector(t, name, sizes, x));
}

// A vector that kernels read in its own dtype.
inline cuda::VectorIn any_vector(const std::optional<Tensor>& t, const char* name, std::initializer_list<int64_t> sizes,
                                 const Tensor& x) {
  if (!t.has_value()) return {};
  check_dense(*t, name, sizes, t->scalar_type(), x);
  return {t->const_data_ptr(), dtype_of(*t, name)};
}

inline cuda::VectorOut vector_out(const std::optional<Tensor>& t, const char* name,
                                  std::initializer_list<int64_t> sizes, const Tensor& x) {
  const cuda::VectorIn v = any_vector(t, name, sizes, x);
  return {const_cast<void*>(v.data), v.dtype};
}

// dw1 and dw2 go together; db1 and db2 need them.
inline void fill_weight_gradients(BackwardCall& call, const std::optional<Tensor>& w1, const std::optional<Tensor>& dw1,
                                  const std::optional<Tensor>& db1, const std::optional<Tensor>& dw2,
                                  const std::optional<Tensor>& db2, const Tensor& x) {
  const CudaProblem& p = call.problem;
  STD_TORCH_CHECK(dw1.has_value() == dw2.has_value(), "senet_fused: dw1 and dw2 go together");
  STD_TORCH_CHECK(dw1.has_value() || (!db1.has_value() && !db2.has_value()), "senet_fused: db1, db2 need dw1, dw2");
  if (!dw1.has_value()) return;
  STD_TORCH_CHECK(w1.has_value(), "senet_fused: dw1 and dw2 need w1");
  check_dense(*dw1, "dw1", {p.r, p.c}, w1->scalar_type(), x);
  check_dense(*dw2, "dw2", {p.c, p.r}, w1->scalar_type(), x);
  call.dw1 = dw1->mutable_data_ptr();
  call.dw2 = dw2->mutable_data_ptr();
  call.db1 = vector_out(db1, "db1", {p.r}, x);
  call.db2 = vector_out(db2, "db2", {p.c}, x);
}

// pooled, preact, peak and ties are columns of `saved`.
inline void fill_saved(Call& call, const Tensor& saved, const Tensor& x) {
  const CudaProblem& p = call.problem;
  const bool peak = p.squeeze != Squeeze::avg;
  call.saved_stride = call.preact_stride = (peak ? 3 : 1) * p.c + p.r;
  check_dense(saved, "saved", {p.n, call.saved_stride}, ScalarType::Float, x);
  call.pooled = static_cast<float*>(saved.mutable_data_ptr());
  call.preact = call.pooled + p.c;
  if (peak) call.peak = call.preact + p.r, call.tied = call.peak + p.c;
}

inline void* output(const std::optional<Tensor>& t, const char* name, const Tensor& x, Call& call) {
  if (!t.has_value()) return nullptr;
  const CudaProblem& p = call.problem;
  check_same_shape(*t, name, x);
  STD_TORCH_CHECK(check_samples(*t, name, p.channels_last) == p.c * p.m, "senet_fused: ", name, " must be dense");
  void* data = t->mutable_data_ptr();
  call.wide = call.wide && is_wide(data, p.c * p.m, p);
  return data;
}

inline const void* input(const Tensor& t, const char* name, const Tensor& x, Call& call, int64_t& stride) {
  check_same_shape(t, name, x);
  stride = check_samples(t, name, call.problem.channels_last);
  call.wide = call.wide && is_wide(t.const_data_ptr(), stride, call.problem);
  return t.const_data_ptr();
}

inline void run(const std::string& error) { STD_TORCH_CHECK(error.empty(), "senet_fused: launching ", error); }

}  // namespace senet
