// Operator name -> function, as ../library.cpp for the CPU. Built for a host, where the kernels run on CPU tensors, the
// names are others, so that one process can have both.
#include <torch/csrc/stable/library.h>

#include "squeeze_excite.h"
#include "tail.h"

#ifdef SENET_ON_HOST
#define SENET_OPERATOR(name) "_cuda_host_" name
#define SENET_KEY CPU
#define SENET_CUDA_ARCHITECTURES "host"
#else
#define SENET_OPERATOR(name) "_cuda_" name
#define SENET_KEY CUDA
#endif

#define SENET_PLAN                                                                                                 \
  "Tensor(z!) workspace, Tensor(y!)? counters, int strategy, int form, int samples, int channels, int positions, " \
  "int lanes, bool dependent_launch, bool stream_stores"

namespace {
// What the library has machine code ("sm_90") and PTX ("compute_100") for.
std::string architectures() { return SENET_CUDA_ARCHITECTURES; }
}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(senet_fused, m) {
  m.def(
      SENET_OPERATOR("forward") "(Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, Tensor? residual, int act, "
      "float act_p0, int gate_fn, float gate_p0, float gate_p1, int squeeze, int relu, bool channels_last, "
      "Tensor(a!) y, Tensor(b!)? gate, Tensor(c!)? saved, Tensor(d!)? mask, " SENET_PLAN ") -> ()");
  m.def(
      SENET_OPERATOR("backward") "(Tensor dy, Tensor? dgate, Tensor x, Tensor w1, Tensor w2, Tensor gate, Tensor "
      "saved, Tensor? mask, int act, float act_p0, int gate_fn, float gate_p0, float gate_p1, int squeeze, int relu, "
      "bool channels_last, Tensor(a!)? dx, Tensor(b!)? dw1, Tensor(c!)? db1, Tensor(d!)? dw2, Tensor(e!)? db2, "
      "Tensor(f!)? dresidual, " SENET_PLAN ") -> ()");
  m.def(
      SENET_OPERATOR("tail_forward") "(Tensor x, Tensor? weight, Tensor? bias, Tensor(a!) statistics, Tensor? mean, "
      "Tensor? var, Tensor? w1, Tensor? b1, Tensor? w2, Tensor? b2, Tensor? residual, Tensor? factor, float eps, int act, float "
      "act_p0, int gate_fn, float gate_p0, float gate_p1, int squeeze, int relu, bool channels_last, Tensor(b!) y, "
      "Tensor(c!)? gate, Tensor(d!)? saved, Tensor(e!)? mask, int stages, " SENET_PLAN ") -> ()");
  m.def(
      SENET_OPERATOR("tail_backward") "(Tensor dy, Tensor x, Tensor? mask, Tensor? weight, Tensor? bias, Tensor "
      "statistics, Tensor? w1, Tensor? w2, Tensor? factor, Tensor? gate, Tensor? saved, int act, float act_p0, int "
      "gate_fn, float gate_p0, float gate_p1, int squeeze, int relu, bool channels_last, float count, Tensor? "
      "shared_dweight, Tensor? shared_dbias, Tensor(a!)? dx, Tensor(b!)? dweight, Tensor(c!)? dbias, Tensor(d!)? dw1, "
      "Tensor(e!)? db1, Tensor(f!)? dw2, Tensor(g!)? db2, Tensor(h!)? dresidual, int stages, " SENET_PLAN ") -> ()");
  m.def(SENET_OPERATOR("architectures") "() -> str");
  m.def(SENET_OPERATOR("driver_problem") "() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(senet_fused, SENET_KEY, m) {
  m.impl(SENET_OPERATOR("forward"), TORCH_BOX(&senet::squeeze_excite_cuda));
  m.impl(SENET_OPERATOR("backward"), TORCH_BOX(&senet::squeeze_excite_backward_cuda));
  m.impl(SENET_OPERATOR("tail_forward"), TORCH_BOX(&senet::tail_forward_cuda));
  m.impl(SENET_OPERATOR("tail_backward"), TORCH_BOX(&senet::tail_backward_cuda));
}

STABLE_TORCH_LIBRARY_IMPL(senet_fused, CompositeExplicitAutograd, m) {
  m.impl(SENET_OPERATOR("architectures"), TORCH_BOX(&architectures));
  m.impl(SENET_OPERATOR("driver_problem"), TORCH_BOX(&senet::cuda_driver_problem));
}
