// What a block tail's kernels are told of BatchNorm.
#pragma once
#include "kernel/tail.cuh"
#include "launch.cuh"

namespace senet::cuda {

inline Norm norm_of(const TailNorm& norm, const CudaProblem& p) {
  return {vector_of(norm.weight),
          vector_of(norm.bias),
          vector_of(norm.factor),
          norm.statistics,
          vector_of(norm.mean),
          vector_of(norm.var),
          norm.eps,
          static_cast<int>(p.c)};
}

inline float inverse(double v) { return static_cast<float>(1.0 / v); }

}  // namespace senet::cuda
