// The CPU kernels as tables of functions, one table per instruction set. Every function works on a range, so that the
// host file can hand ranges to threads; no range changes the order of a sum.
//
// A is the accumulation type (float, double for float64). Planes are the m elements of one channel in contiguous
// memory, pixels the c elements of one position in channels_last memory; "rows" are whichever of the two.
#pragma once
#include <cstdint>

#include "../plan/plan.h"

namespace senet {

template <class A>
struct ScaleArgs {  // (E4), with a norm in front (T3), for one sample
  const void* x;
  const A* mean;         // [c] with a norm, else null
  const A* scale;        // [c] the gate, of (T3) A
  const A* shift;        // [c] of (T3) D, with a mean
  const void* residual;  // or null
  void* y;
  uint8_t* mask;  // of this sample, or null
  int64_t rows, columns;
  bool relu, stream;
};

template <class A>
struct DotArgs {  // (B1), (B2) for one sample
  const void* dy;
  const void* x;
  const uint8_t* mask;  // or null
  void* dresidual;      // where g goes, or null
  int64_t rows, columns;
};

template <class A>
struct MomentArgs {  // (T4) for one sample
  const void* dy;
  const void* x;
  const uint8_t* mask;  // or null
  const A* mean;        // [c]
  A* sum;               // [c] of g
  A* centred;           // [c] of g * (x - mean)
  int64_t rows, columns;
};

// (B6), with a norm in front (T7), for one sample: dx = scale * g + what x adds + shift. x is read only for a slope or
// a peak.
template <class A>
struct GradientArgs {
  const void* dy;
  const uint8_t* mask;  // or null: dy is masked already, or there is no post_act
  const void* x;
  const A* scale;    // [c]
  const A* shift;    // [c] what every position gets, with a peak those below it
  const A* mean;     // [c] with a slope
  const A* slope;    // [c] of x - mean, or null
  const A* peak;     // [c] or null
  const A* at_peak;  // [c] what the positions get that attain the peak
  void* dx;
  void* dresidual;  // where g goes, or null; with a mask
  int64_t rows, columns;
  bool stream;
};

// (P1), (P2), (P3), (P6) for one sample: u = weight * (x - mean) + bias, a = f(u). Each kernel reads what is its own.
template <class A>
struct ActivatedArgs {
  const void* x;
  const A* mean;    // [c]
  const A* weight;  // [c] that of the norm, times rstd
  const A* bias;    // [c]
  Function f;
  double p0;
  int64_t rows, columns;
  // (P1): the sum of a, [c]. (P3): one sum of dy's behind the other, each sums_stride further.
  A* sums;
  int64_t sums_stride;
  bool gated;
  // (P2): y = scale * a + residual.
  const A* scale;        // [c], or null for 1; (P6): weight * what multiplies g
  const void* residual;  // or null
  void* y;
  uint8_t* mask_out;  // or null
  bool relu, stream;
  // (P3), (P6)
  const void* dy;
  const uint8_t* mask;  // or null
  const A* pooled;      // [c] what every position gets before the activation's slope multiplies it
  const A* slope;       // [c] of x - mean, or null with given statistics
  const A* shift;       // [c]
  void* dx;
  void* dresidual;  // where g goes, or null; with a mask
};

// Kernels of one element type of x.
template <class A>
struct TensorKernels {
  // sum[ch] over m for channels [c0, c1)
  void (*sum_planes)(const void* x, int64_t m, int64_t c0, int64_t c1, A* sum);
  void (*sum_pixels)(const void* x, int64_t c, int64_t m, int64_t c0, int64_t c1, A* sum, A* scratch);
  // the maximum over m and how many positions attain it
  void (*peak_planes)(const void* x, int64_t m, int64_t c0, int64_t c1, A* peak, A* ties);
  void (*peak_pixels)(const void* x, int64_t c, int64_t m, int64_t c0, int64_t c1, A* peak, A* ties);
  // sum of g * x; the scratch of the pixel form holds 2 c values
  void (*dot_planes)(const DotArgs<A>& args, int64_t c0, int64_t c1, A* sum);
  void (*dot_pixels)(const DotArgs<A>& args, int64_t c0, int64_t c1, A* sum, A* scratch);
  // the mean over m and the sum of squared deviations; the scratch of these pixel forms holds 2 c doubles
  void (*moments_planes)(const void* x, int64_t m, int64_t c0, int64_t c1, double* mean, A* squares);
  void (*moments_pixels)(const void* x, int64_t c, int64_t m, int64_t c0, int64_t c1, double* mean, A* squares,
                         double* scratch);
  // the sums of g and of g * (x - mean)
  void (*gradient_moments_planes)(const MomentArgs<A>& args, int64_t c0, int64_t c1, double* scratch);
  void (*gradient_moments_pixels)(const MomentArgs<A>& args, int64_t c0, int64_t c1, double* scratch);
  // with an activation behind the norm; totals: doubles, for pixels as many as c times the sums of one channel
  void (*activated_sum_planes)(const ActivatedArgs<A>& args, int64_t c0, int64_t c1, double* totals);
  void (*activated_sum_pixels)(const ActivatedArgs<A>& args, int64_t c0, int64_t c1, double* totals);
  void (*activated_moments_planes)(const ActivatedArgs<A>& args, int64_t c0, int64_t c1, double* totals);
  void (*activated_moments_pixels)(const ActivatedArgs<A>& args, int64_t c0, int64_t c1, double* totals);
  // the last sweeps, rows [r0, r1)
  void (*activated_scale_planes)(const ActivatedArgs<A>& args, int64_t r0, int64_t r1);
  void (*activated_scale_pixels)(const ActivatedArgs<A>& args, int64_t r0, int64_t r1);
  void (*activated_gradient_planes)(const ActivatedArgs<A>& args, int64_t r0, int64_t r1);
  void (*activated_gradient_pixels)(const ActivatedArgs<A>& args, int64_t r0, int64_t r1);
  void (*scale_planes)(const ScaleArgs<A>& args, int64_t r0, int64_t r1);
  void (*scale_pixels)(const ScaleArgs<A>& args, int64_t r0, int64_t r1);
  void (*gradient_planes)(const GradientArgs<A>& args, int64_t r0, int64_t r1);
  void (*gradient_pixels)(const GradientArgs<A>& args, int64_t r0, int64_t r1);
};

// Small matrix products with weights of one type; every vector operand has a row stride of its own.
template <class A>
struct WeightKernels {
  // out[i, row] = bias[row] + sum_k w[row, k] * v[i, k]     rows [row0, row1), w is [*, k]
  void (*rows_dot)(const void* w, const A* bias, const A* v, int64_t v_stride, A* out, int64_t out_stride, int64_t n,
                   int64_t row0, int64_t row1, int64_t k);
  // out[i, col] = sum_j v[i, j] * w[j, col]                 columns [col0, col1), w is [j, width]
  void (*columns_dot)(const void* w, int64_t width, const A* v, int64_t v_stride, A* out, int64_t out_stride, int64_t n,
                      int64_t col0, int64_t col1, int64_t j);
  // dw[row, k] = sum_i a[i, row] * b[i, k]                  rows [row0, row1), dw is [*, k]
  void (*outer_sum)(const A* a, int64_t a_stride, const A* b, int64_t b_stride, void* dw, int64_t n, int64_t row0,
                    int64_t row1, int64_t k);
};

// Elementwise functions on rows of accumulators.
template <class A>
struct FunctionKernels {
  void (*apply)(Function f, double p0, double p1, const A* v, A* out, int64_t count);
  // f(v) and f'(v); value may be v
  void (*apply_with_slope)(Function f, double p0, double p1, const A* v, A* value, A* slope, int64_t count);
  // out = d * f'(v)
  void (*backward)(Function f, double p0, double p1, const A* v, const A* d, A* out, int64_t count);
  // out = d * f', with f' worked out from f's value
  void (*backward_from_output)(Function f, double p0, double p1, const A* value, const A* d, A* out, int64_t count);
};

struct Kernels {
  const char* name;
  TensorKernels<float> float32, bfloat16, float16;
  TensorKernels<double> float64;
  WeightKernels<float> weight_float32, weight_bfloat16, weight_float16;
  WeightKernels<double> weight_float64;
  FunctionKernels<float> function_float;
  FunctionKernels<double> function_double;
};

namespace baseline {
const Kernels& kernels();
}
#if defined(SENET_X86_DISPATCH)
namespace avx2 {
const Kernels& kernels();
}
namespace avx512 {
const Kernels& kernels();
}
namespace avx512_bf16 {
const Kernels& kernels();
}
#endif

}  // namespace senet
