// What the kernels of block tails know of BatchNorm; equation numbers (T1) to (T7) are those of
// senet_fused/reference.py.
#pragma once
#include <cstdint>

#include "../prim/weights.cuh"
#include "tile.cuh"

namespace senet::cuda {

constexpr int kTailC = static_cast<int>(kTailChannels);

struct Norm {
  Vector weight, bias;  // [c], or none: ones, zeros
  Vector factor;        // of each sample, or none: ones
  float* statistics;    // [3, c]: mean, (variance + eps)^-1/2, the variance that is kept
  Vector mean, var;     // [c]: those that are given, which take the place of statistics; or none
  float eps;
  int c;

  __device__ __forceinline__ float weight_at(int k) const { return weight.is_there() ? weight[k] : 1.0f; }
  __device__ __forceinline__ float bias_at(int k) const { return bias.is_there() ? bias[k] : 0.0f; }
  __device__ __forceinline__ float factor_at(int64_t n) const { return factor.is_there() ? factor[n] : 1.0f; }
  __device__ __forceinline__ float mean_at(int k) const { return mean.is_there() ? mean[k] : __ldcg(statistics + k); }
  __device__ __forceinline__ float rstd_at(int k) const {
    return var.is_there() ? rstd_of(var[k]) : __ldcg(statistics + c + k);
  }
  __device__ __forceinline__ float rstd_of(float variance) const { return 1.0f / sqrtf(variance + eps); }
  __device__ __forceinline__ void keep(int k, float mean_k, float rstd, float variance) const {
    statistics[k] = mean_k;
    statistics[c + k] = rstd;
    statistics[2 * static_cast<int64_t>(c) + k] = variance;
  }
};

// What no rounding may make negative; NaN stays.
__device__ __forceinline__ float at_least_zero(float v) { return v < 0.0f ? 0.0f : v; }

__device__ __forceinline__ float finite_or_zero(float v) { return fabsf(v) < INFINITY ? v : 0.0f; }

}  // namespace senet::cuda
