// What the operators on the CPU have in common: the stages between the sweeps, and how work is handed to threads. No
// torch: threads come in as a function.
#pragma once
#include <algorithm>
#include <cstddef>
#include <memory>

#include "../plan/plan.h"
#include "kernels.h"

namespace senet {

// Calls body(begin, end, context) on disjoint ranges that cover [0, count), on several threads.
using ParallelFor = void (*)(int64_t count, void (*body)(int64_t, int64_t, void*), void* context);

template <class F>
void parallel_over(ParallelFor parallel_for, int64_t count, const F& f) {
  parallel_for(
      count, [](int64_t begin, int64_t end, void* context) { (*static_cast<const F*>(context))(begin, end); },
      const_cast<F*>(&f));
}

template <class A>
struct Scratch {
  std::unique_ptr<A[]> data;
  explicit Scratch(int64_t count) : data(new A[static_cast<size_t>(count)]) {}
  A* get() const { return data.get(); }
};

struct Options {
  Function act;
  double act_p0;
  Function gate;
  double gate_p0, gate_p1;
  Squeeze squeeze;
  bool relu;         // post_act
  Function pre_act;  // behind the norm; identity: there is none
  double pre_act_p0;
};

// What forward and backward have in common: sizes, kernels, the inputs that both read, the columns of `saved`.
template <class A>
struct Layer {
  Problem problem;  // r is 0 without a gate
  Options options;
  CpuPlan plan;
  ParallelFor parallel_for;
  const void* w1;
  const void* w2;
  const TensorKernels<A>* tensor;
  const WeightKernels<A>* products;
  const FunctionKernels<A>* function;
  const char* x;
  int64_t x_stride;
  const A* statistics;  // [3, c]: mean, rstd, variance; null: there is no norm
  const A* weight;      // [c] or null, of the norm
  const A* bias;        // [c] or null, of the norm
  const A* factor;      // [n] or null
  const A* gate;        // [n, c] or null

  bool has_peak() const { return options.squeeze != Squeeze::avg; }
  int64_t saved_stride() const { return problem.c + problem.r + (has_peak() ? 2 * problem.c : 0); }
  int64_t rows() const { return problem.channels_last ? problem.m : problem.c; }
  int64_t columns() const { return problem.channels_last ? problem.c : problem.m; }
  int64_t mask_bytes() const { return rows() * ((columns() + 7) / 8); }
  int64_t bytes(int64_t elements) const { return elements * problem.element_size; }
  const char* sample(const char* t, int64_t n, int64_t stride) const { return t + bytes(n * stride); }
  int64_t dense(int64_t n) const { return bytes(n * problem.c * problem.m); }  // where a sample of an output begins
  const uint8_t* bits(const uint8_t* mask, int64_t n) const {
    return mask != nullptr ? mask + n * mask_bytes() : nullptr;
  }

  // f(sample, begin, end) for parts of [0, size) of every sample; parts begin at multiples of `step`. A second sweep
  // goes backwards, because what a thread has read last is the nearest.
  template <bool kBackwards = false, class F>
  void over_pieces(int64_t size, int64_t step, const F& f) const {
    const int64_t pieces = plan.pieces_per_sample;
    const int64_t piece = ((size + pieces - 1) / pieces + step - 1) / step * step;
    parallel_over(parallel_for, problem.n * pieces, [&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; ++j) {
        const int64_t i = kBackwards ? begin + end - 1 - j : j;
        const int64_t from = i % pieces * piece, to = std::min(size, from + piece);
        if (from < to) f(i / pieces, from, to);
      }
    });
  }

  // f(begin, end) for ranges of [0, size) that begin at multiples of 16.
  template <class F>
  void over_blocks(int64_t size, const F& f) const {
    constexpr int64_t kBlock = 16;
    parallel_over(parallel_for, (size + kBlock - 1) / kBlock,
                  [&](int64_t begin, int64_t end) { f(begin * kBlock, std::min(size, end * kBlock)); });
  }

  // Every stage for a range of samples on one thread: `first` a sample, `middle` a range of samples, `last` a sample.
  // The last sweep goes backwards, because the sample that was read last is the nearest.
  template <class First, class Middle, class Last>
  void over_samples(const First& first, const Middle& middle, const Last& last) const {
    const auto run = [&](int64_t begin, int64_t end) {
      const Scratch<A> scratch(2 * problem.c);
      for (int64_t n0 = begin; n0 < end; n0 += plan.samples_at_a_time) {
        const int64_t n1 = std::min(end, n0 + plan.samples_at_a_time);
        for (int64_t n = n0; n < n1; ++n) first(n, scratch.get());
        middle(n0, n1);
        for (int64_t n = n1; n-- > n0;) last(n);
      }
    };
    if (plan.strategy == CpuStrategy::serial)
      run(0, problem.n);
    else
      parallel_over(parallel_for, problem.n, run);
  }

  // The norm. Vectors of (T3) and (T7) are [n, c], or one row for all samples where these do not differ.

  const A* mean() const { return statistics; }
  const A* rstd() const { return statistics + problem.c; }
  A slope(int64_t c) const { return weight != nullptr ? weight[c] * rstd()[c] : rstd()[c]; }
  bool per_sample() const { return gate != nullptr || factor != nullptr; }
  int64_t row(int64_t n) const { return per_sample() ? n * problem.c : 0; }

  // What multiplies BatchNorm's output.
  A branch(int64_t n, int64_t c) const {
    return (gate != nullptr ? gate[n * problem.c + c] : A(1)) * (factor != nullptr ? factor[n] : A(1));
  }

  // A of (T3).
  void scales(A* scale, int64_t c0, int64_t c1) const {
    const int64_t samples = per_sample() ? problem.n : 1;
    for (int64_t n = 0; n < samples; ++n)
      for (int64_t c = c0; c < c1; ++c) scale[row(n) + c] = slope(c) * branch(n, c);
  }

  // What multiplies an activated value, of the channels [c0, c1) of one sample.
  void branches(A* scale, int64_t n, int64_t c0, int64_t c1) const {
    for (int64_t c = c0; c < c1; ++c) scale[n * problem.c + c] = branch(n, c);
  }

  bool has_pre_act() const { return options.pre_act != Function::identity; }
  // The norm as u = weight * (x - mean) + bias: [2, c], weight times rstd and bias.
  void affine(A* to) const {
    for (int64_t c = 0; c < problem.c; ++c) {
      to[c] = slope(c);
      to[problem.c + c] = bias != nullptr ? bias[c] : A(0);
    }
  }
  // What every sweep with an activation reads of a sample.
  ActivatedArgs<A> activated(int64_t n, const A* affine) const {
    ActivatedArgs<A> args{};
    args.x = sample(x, n, x_stride);
    args.mean = mean();
    args.weight = affine;
    args.bias = affine + problem.c;
    args.f = options.pre_act;
    args.p0 = options.pre_act_p0;
    args.rows = rows();
    args.columns = columns();
    args.stream = plan.stream_stores;
    return args;
  }

  // The squeeze of the norm's output, from xbar, the mean of x.
  void pool(const A* xbar, int64_t stride, A* pooled, int64_t c0, int64_t c1) const {  // (T2)
    for (int64_t n = 0; n < problem.n; ++n)
      for (int64_t c = c0; c < c1; ++c)
        pooled[n * problem.c + c] = slope(c) * (xbar[n * stride + c] - mean()[c]) + (bias != nullptr ? bias[c] : A(0));
  }

  // The excitation, for samples [n0, n1) and a range of what each stage makes. pooled and preact have row strides.

  void reduce(const A* b1, const A* pooled, int64_t pooled_stride, A* preact, int64_t preact_stride, A* hidden,
              int64_t n0, int64_t n1, int64_t r0, int64_t r1) const {  // (E2)
    const Problem& p = problem;
    products->rows_dot(w1, b1, pooled + n0 * pooled_stride, pooled_stride, preact + n0 * preact_stride, preact_stride,
                       n1 - n0, r0, r1, p.c);
    for (int64_t n = n0; n < n1; ++n)
      function->apply(options.act, options.act_p0, 0, preact + n * preact_stride + r0, hidden + n * p.r + r0, r1 - r0);
  }

  void expand(const A* b2, const A* hidden, A* gate, int64_t n0, int64_t n1, int64_t c0, int64_t c1) const {  // (E3)
    const Problem& p = problem;
    products->rows_dot(w2, b2, hidden + n0 * p.r, p.r, gate + n0 * p.c, p.c, n1 - n0, c0, c1, p.r);
    for (int64_t n = n0; n < n1; ++n) {
      A* g = gate + n * p.c + c0;
      function->apply(options.gate, options.gate_p0, options.gate_p1, g, g, c1 - c0);
    }
  }

  void expand_backward(const A* dlogit, const A* preact, int64_t preact_stride, A* dpreact, int64_t n0, int64_t n1,
                       int64_t r0, int64_t r1) const {  // (B4)
    const Problem& p = problem;
    products->columns_dot(w2, p.r, dlogit + n0 * p.c, p.c, dpreact + n0 * p.r, p.r, n1 - n0, r0, r1, p.c);
    for (int64_t n = n0; n < n1; ++n) {
      A* d = dpreact + n * p.r + r0;
      function->backward(options.act, options.act_p0, 0, preact + n * preact_stride + r0, d, d, r1 - r0);
    }
  }

  void reduce_backward(const A* dpreact, A* dpooled, int64_t n0, int64_t n1, int64_t c0, int64_t c1) const {  // (B5)
    const Problem& p = problem;
    products->columns_dot(w1, p.c, dpreact + n0 * p.r, p.r, dpooled + n0 * p.c, p.c, n1 - n0, c0, c1, p.r);
  }

  void weight_gradients(const A* dlogit, const A* dpreact, const A* pooled, int64_t pooled_stride, const A* preact,
                        int64_t preact_stride, void* dw1, A* db1, void* dw2, A* db2) const {  // (B7)
    const Problem& p = problem;
    const Scratch<A> hidden(p.n * p.r);
    for (int64_t n = 0; n < p.n; ++n)
      function->apply(options.act, options.act_p0, 0, preact + n * preact_stride, hidden.get() + n * p.r, p.r);
    const auto sum_over_samples = [&p](const A* d, int64_t stride, A* out) {
      std::fill(out, out + stride, A(0));
      for (int64_t n = 0; n < p.n; ++n)
        for (int64_t i = 0; i < stride; ++i) out[i] += d[n * stride + i];
    };
    if (db1 != nullptr) sum_over_samples(dpreact, p.r, db1);
    if (db2 != nullptr) sum_over_samples(dlogit, p.c, db2);
    const auto rows1 = [&](int64_t r0, int64_t r1) {
      products->outer_sum(dpreact, p.r, pooled, pooled_stride, dw1, p.n, r0, r1, p.c);
    };
    const auto rows2 = [&](int64_t c0, int64_t c1) {
      products->outer_sum(dlogit, p.c, hidden.get(), p.r, dw2, p.n, c0, c1, p.r);
    };
    if (plan.strategy == CpuStrategy::serial) {
      rows1(0, p.r);
      rows2(0, p.c);
      return;
    }
    // Both halves cost n * c * r: part i of kParts is a share of the rows of each.
    constexpr int64_t kParts = 64;
    parallel_over(parallel_for, kParts, [&](int64_t begin, int64_t end) {
      rows1(p.r * begin / kParts, p.r * end / kParts);
      rows2(p.c * begin / kParts, p.c * end / kParts);
    });
  }
};

}  // namespace senet
