// Operator name -> function. The public operators and their schemas are Python's (senet_fused/ops); these are what
// they call on the CPU, on tensors that are allocated there.
#include <torch/csrc/stable/library.h>

#include "cpu/fused_se.h"
#include "cpu/host.h"

STABLE_TORCH_LIBRARY_FRAGMENT(senet_fused, m) {
  m.def("_cpu_moments(Tensor x, float eps, bool channels_last, Tensor(a!)? saved, Tensor(b!)? statistics) -> ()");
  m.def(
      "_cpu_forward(Tensor x, Tensor? weight, Tensor? bias, Tensor? statistics, Tensor? w1, Tensor? b1, Tensor? w2, "
      "Tensor? b2, Tensor? residual, Tensor? factor, int act, float act_p0, int gate_fn, float gate_p0, float gate_p1, "
      "int squeeze, int relu, int pre_act, float pre_act_p0, bool channels_last, Tensor(a!) y, Tensor(b!)? gate, "
      "Tensor(c!)? saved, Tensor(d!)? mask) "
      "-> ()");
  m.def(
      "_cpu_backward(Tensor dy, Tensor? dgate, Tensor x, Tensor w1, Tensor w2, Tensor gate, Tensor saved, Tensor? "
      "mask, int act, float act_p0, int gate_fn, float gate_p0, float gate_p1, int squeeze, int relu, bool "
      "channels_last, Tensor(a!)? dx, Tensor(b!)? dw1, Tensor(c!)? db1, Tensor(d!)? dw2, Tensor(e!)? db2, Tensor(f!)? "
      "dresidual) -> ()");
  m.def(
      "_cpu_gradient_sums(Tensor dy, Tensor x, Tensor? mask, Tensor? weight, Tensor? bias, Tensor statistics, Tensor? "
      "w1, Tensor? w2, Tensor? factor, Tensor? gate, Tensor? saved, int act, float act_p0, int gate_fn, float gate_p0, "
      "float gate_p1, int squeeze, int relu, int pre_act, float pre_act_p0, bool channels_last, Tensor(a!) dweight, "
      "Tensor(b!) dbias, Tensor(c!)? "
      "dpooled, Tensor(d!)? dw1, Tensor(e!)? db1, Tensor(f!)? dw2, Tensor(g!)? db2) -> ()");
  m.def(
      "_cpu_gradient(Tensor dy, Tensor x, Tensor? mask, Tensor? weight, Tensor? bias, Tensor statistics, Tensor? "
      "factor, Tensor? "
      "gate, Tensor dweight, Tensor dbias, Tensor? dpooled, float count, int pre_act, float pre_act_p0, bool "
      "channels_last, Tensor(a!) dx, "
      "Tensor(b!)? dresidual) -> ()");
  m.def("_cpu_function(Tensor x, int f, float p0, float p1, Tensor(a!) value, Tensor(b!)? slope) -> ()");
  m.def("_cpu_instruction_set() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(senet_fused, CPU, m) {
  m.impl("_cpu_moments", TORCH_BOX(&senet::moments_cpu));
  m.impl("_cpu_forward", TORCH_BOX(&senet::forward_cpu));
  m.impl("_cpu_backward", TORCH_BOX(&senet::backward_cpu));
  m.impl("_cpu_gradient_sums", TORCH_BOX(&senet::gradient_sums_cpu));
  m.impl("_cpu_gradient", TORCH_BOX(&senet::gradient_cpu));
  m.impl("_cpu_function", TORCH_BOX(&senet::function_cpu));
}

STABLE_TORCH_LIBRARY_IMPL(senet_fused, CompositeExplicitAutograd, m) {
  m.impl("_cpu_instruction_set", TORCH_BOX(&senet::cpu_instruction_set));
}
