#pragma once
#include "excite.h"
namespace senet {
namespace SENET_ISA {
template <class A>
void function_values(Function f, double p0, double p1, const A* u, A* value, int64_t count) {
  for (int64_t i = 0; i < count; ++i) value[i] = value_of<A>(f, A(p0), A(p1), u[i]);
}
template <class A>
void function_values_and_slopes(Function f, double p0, double p1, const A* u, A* value, A* slope, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const A v = u[i];
    slope[i] = derivative_of<A>(f, A(p0), A(p1), v);
    value[i] = value_of<A>(f, A(p0), A(p1), v);
  }
}
}  // namespace SENET_ISA
}  // namespace senet
