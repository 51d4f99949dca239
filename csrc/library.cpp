// Operator name -> function. The public operators and their schemas are Python's (senet_fused/ops.py); these are what
// they call on the CPU, on tensors that are allocated there.
#include <torch/csrc/stable/library.h>

#include "cpu/squeeze_excite.h"

STABLE_TORCH_LIBRARY_FRAGMENT(senet_fused, m) {
  m.def(
      "_cpu_forward(Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, Tensor? residual, int act, float act_p0, "
      "int gate_fn, float gate_p0, float gate_p1, int squeeze, int relu, bool channels_last, Tensor(a!) y, "
      "Tensor(b!)? gate, Tensor(c!)? saved, Tensor(d!)? mask) -> ()");
  m.def(
      "_cpu_backward(Tensor dy, Tensor? dgate, Tensor x, Tensor w1, Tensor w2, Tensor gate, Tensor saved, Tensor mask, "
      "int act, float act_p0, int gate_fn, float gate_p0, float gate_p1, int squeeze, int relu, bool channels_last, "
      "Tensor(a!)? dx, Tensor(b!)? dw1, Tensor(c!)? db1, Tensor(d!)? dw2, Tensor(e!)? db2, Tensor(f!)? dresidual) -> "
      "()");
  m.def("_cpu_instruction_set() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(senet_fused, CPU, m) {
  m.impl("_cpu_forward", TORCH_BOX(&senet::squeeze_excite_cpu));
  m.impl("_cpu_backward", TORCH_BOX(&senet::squeeze_excite_backward_cpu));
}

STABLE_TORCH_LIBRARY_IMPL(senet_fused, CompositeExplicitAutograd, m) {
  m.impl("_cpu_instruction_set", TORCH_BOX(&senet::cpu_instruction_set));
}
