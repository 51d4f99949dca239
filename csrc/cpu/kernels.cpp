// Compiled once per instruction set, with SENET_ISA naming the namespace; see kernels.h.
#include "kernels.h"

#include "kernel/activated.h"
#include "kernel/excite.h"
#include "kernel/functions.h"
#include "kernel/moments.h"
#include "kernel/scale.h"
#include "kernel/squeeze.h"

#define SENET_TEXT(x) #x
#define SENET_NAME(x) SENET_TEXT(x)

namespace senet {
namespace SENET_ISA {
namespace {

template <class T>
constexpr TensorKernels<Acc<T>> tensor_kernels() {
  return {sum_planes<T>,
          sum_pixels<T>,
          peak_planes<T>,
          peak_pixels<T>,
          dot_planes<T>,
          dot_pixels<T>,
          moments_planes<T>,
          moments_pixels<T>,
          gradient_moments_planes<T>,
          gradient_moments_pixels<T>,
          activated_sum<T, false>,
          activated_sum<T, true>,
          activated_moments<T, false>,
          activated_moments<T, true>,
          activated_scale<T, false>,
          activated_scale<T, true>,
          activated_gradient<T, false>,
          activated_gradient<T, true>,
          scale<T, false>,
          scale<T, true>,
          gradient<T, false>,
          gradient<T, true>};
}
template <class W>
constexpr WeightKernels<Acc<W>> weight_kernels() {
  return {rows_dot<W>, columns_dot<W>, outer_sum<W>};
}
template <class A>
constexpr FunctionKernels<A> function_kernels() {
  return {function_values<A>, function_values_and_slopes<A>, function_backward<A>, function_backward_from_output<A>};
}

const Kernels kTable{
    SENET_NAME(SENET_ISA),    tensor_kernels<float>(),   tensor_kernels<bfloat16>(), tensor_kernels<float16>(),
    tensor_kernels<double>(), weight_kernels<float>(),   weight_kernels<bfloat16>(), weight_kernels<float16>(),
    weight_kernels<double>(), function_kernels<float>(), function_kernels<double>(),
};

}  // namespace

const Kernels& kernels() { return kTable; }

}  // namespace SENET_ISA
}  // namespace senet
