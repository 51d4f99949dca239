// One call as the host file hands it to the launches: checked, planned, with all its memory. No torch, no CUDA.
#pragma once
#include <cstdint>
#include <string>

#include "../plan/cuda_plan.h"

namespace senet::cuda {

enum class Dtype : int { float32, bfloat16, float16 };

// A vector in its own dtype; data may be null.
struct VectorIn {
  const void* data;
  Dtype dtype;
};
struct VectorOut {
  void* data;
  Dtype dtype;
};

struct Call {
  CudaProblem problem;
  CudaPlan plan;
  Dtype dtype, weight_dtype;  // of x, of w1 and w2
  bool wide;                  // tensors lie so that 16 bytes can be read at a time
  Function act, gate_fn;
  float act_p0, gate_p0, gate_p1;
  const void *x, *w1, *w2;
  int64_t x_stride;                      // from sample to sample, in elements
  float *parts, *peaks, *ties, *shares;  // the workspace
  float *pooled, *preact, *peak, *tied;  // forward: what is kept, or null; backward: what was kept
  int64_t saved_stride, preact_stride;   // of pooled, peak, tied; of preact
  int* counters;                         // "last_block": one for each group of samples, at zero
  float* gate;                           // [n, c]; forward: null where it is neither kept nor needed
  int device;
  void* stream;
};

struct ForwardCall : Call {
  VectorIn b1, b2;
  const void* residual;  // or null
  int64_t residual_stride;
  void* y;                // dense
  uint8_t* mask;          // or null
  bool parts_are_pooled;  // the only split's part goes where pooled is kept
};

struct BackwardCall : Call {
  const void* dy;
  int64_t dy_stride;
  const float* dgate;   // or null
  const uint8_t* mask;  // or null
  float *dpreact, *dpooled;
  void *dx, *dresidual, *dw1, *dw2;  // or null; dw1 and dw2 go together
  VectorOut db1, db2;
};

// BatchNorm's side of a block tail.
struct TailNorm {
  VectorIn weight, bias, factor;  // [c], [c], [n]
  float* statistics;              // [3, c]
  VectorIn mean, var;             // [c], forward with given statistics
  float eps;
};

// parts is not used: shifts, means and squares take its place (with given statistics, means alone).
struct TailForwardCall : ForwardCall {
  TailNorm norm;
  float *shifts, *means, *squares;  // the workspace
};

// parts: of dlogit.
struct TailBackwardCall : BackwardCall {
  TailNorm norm;
  double count;                      // m of (T7); 0 with given statistics
  float* sums;                       // [2, n, splits, c], the workspace
  float *parts_weight, *parts_bias;  // [groups, c]
  int64_t groups;
  VectorOut dweight, dbias;
};

// Why the driver cannot run what this library was built with; empty if it can. Makes no context.
std::string driver_problem();

// Each launches one kernel (excite two), and returns an empty text or what went wrong, with the kernel and its plan.
std::string launch_squeeze(const ForwardCall& call);
std::string launch_excite(const ForwardCall& call);
std::string launch_scale(const ForwardCall& call);
std::string launch_squeeze_backward(const BackwardCall& call);
std::string launch_excite_backward(const BackwardCall& call);
std::string launch_scale_backward(const BackwardCall& call);

// The second half of launch_excite and the first of launch_excite_backward.
std::string launch_excite_gate(const ForwardCall& call);
std::string launch_excite_push_backward(const BackwardCall& call);

std::string launch_tail_moments(const TailForwardCall& call);
// merges: makes the statistics. pushes: and what the gate is made from.
std::string launch_tail_excite(const TailForwardCall& call, bool merges, bool pushes, bool first);
std::string launch_tail_apply(const TailForwardCall& call, bool first);
std::string launch_tail_sums(const TailBackwardCall& call);
std::string launch_tail_excite_backward(const TailBackwardCall& call);
std::string launch_tail_apply_backward(const TailBackwardCall& call, bool first);

}  // namespace senet::cuda
