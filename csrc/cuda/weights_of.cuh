// What the weight gradients' tiles are told, for whichever launch they are a part of.
#pragma once
#include "kernel/weight_gradients.cuh"
#include "launch.cuh"

namespace senet::cuda {

inline WeightArguments weights_of(const BackwardCall& call) {
  const CudaProblem& p = call.problem;
  WeightArguments w{};
  w.n = p.n;
  w.splits = static_cast<int>(call.plan.splits);
  w.pooled = call.pooled;
  w.pooled_stride = call.saved_stride;
  w.parts = call.parts;
  w.dpreact = call.plan.strategy == CudaStrategy::last_block ? call.dpreact : nullptr;
  w.dw1 = call.dw1;
  w.dw2 = call.dw2;
  w.db1 = target_of(call.db1);
  w.db2 = target_of(call.db2);
  w.wide = p.c % 4 == 0 && p.r % 4 == 0 && reinterpret_cast<uintptr_t>(call.pooled) % 16 == 0;
  return w;
}

}  // namespace senet::cuda
