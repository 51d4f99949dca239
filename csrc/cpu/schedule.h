// The order of the stages over samples and threads, for one plan. No torch: threads come in as a function.
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
  bool relu;  // post_act
};

// What forward and backward have in common: sizes, kernels, the columns of `saved`.
template <class A>
struct Layer {
  Problem problem;
  Options options;
  CpuPlan plan;
  ParallelFor parallel_for;
  const TensorKernels<A>* tensor;
  const WeightKernels<A>* weight;
  const FunctionKernels<A>* function;

  bool has_peak() const { return options.squeeze != Squeeze::avg; }
  int64_t saved_stride() const { return problem.c + problem.r + (has_peak() ? 2 * problem.c : 0); }
  int64_t rows() const { return problem.channels_last ? problem.m : problem.c; }
  int64_t columns() const { return problem.channels_last ? problem.c : problem.m; }
  int64_t mask_bytes() const { return rows() * ((columns() + 7) / 8); }
  int64_t bytes(int64_t elements) const { return elements * problem.element_size; }

  // f(sample, begin, end) for parts of [0, size) of every sample; parts begin at multiples of `step`.
  template <class F>
  void over_pieces(int64_t size, int64_t step, const F& f) const {
    const int64_t pieces = plan.pieces_per_sample;
    const int64_t piece = ((size + pieces - 1) / pieces + step - 1) / step * step;
    parallel_over(parallel_for, problem.n * pieces, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
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
};

// ------------------------------------------------------------------------------------------------ forward

template <class A>
struct Forward : Layer<A> {
  const char* x;
  int64_t x_stride;
  const void* w1;
  const A* b1;
  const void* w2;
  const A* b2;
  const char* residual;
  int64_t residual_stride;
  char* y;
  A* gate;
  A* saved;
  uint8_t* mask;

  A* pooled(int64_t n) const { return saved + n * this->saved_stride(); }
  A* preact(int64_t n) const { return pooled(n) + this->problem.c; }
  A* peak(int64_t n) const { return preact(n) + this->problem.r; }
  A* ties(int64_t n) const { return peak(n) + this->problem.c; }

  void squeeze(int64_t n, int64_t c0, int64_t c1, A* scratch) const {  // (E1)
    const Problem& p = this->problem;
    const Squeeze kind = this->options.squeeze;
    const void* sample = x + this->bytes(n * x_stride);
    A* out = pooled(n);
    if (kind != Squeeze::avg) {
      if (p.channels_last)
        this->tensor->peak_pixels(sample, p.c, p.m, c0, c1, peak(n), ties(n));
      else
        this->tensor->peak_planes(sample, p.m, c0, c1, peak(n), ties(n));
      if (kind == Squeeze::max) {
        std::copy(peak(n) + c0, peak(n) + c1, out + c0);
        return;
      }
    }
    if (p.channels_last)
      this->tensor->sum_pixels(sample, p.c, p.m, c0, c1, out, scratch);
    else
      this->tensor->sum_planes(sample, p.m, c0, c1, out);
    for (int64_t c = c0; c < c1; ++c) out[c] /= static_cast<A>(p.m);
    if (kind == Squeeze::avgmax)
      for (int64_t c = c0; c < c1; ++c) out[c] = A(0.5) * out[c] + A(0.5) * peak(n)[c];
  }

  void reduce(int64_t n0, int64_t n1, int64_t r0, int64_t r1, A* hidden) const {  // (E2)
    const Problem& p = this->problem;
    this->weight->rows_dot(w1, b1, pooled(n0), this->saved_stride(), preact(n0), this->saved_stride(), n1 - n0, r0, r1,
                           p.c);
    for (int64_t n = n0; n < n1; ++n)
      this->function->apply(this->options.act, this->options.act_p0, 0, preact(n) + r0, hidden + n * p.r + r0, r1 - r0);
  }

  void expand(int64_t n0, int64_t n1, int64_t c0, int64_t c1, const A* hidden) const {  // (E3)
    const Problem& p = this->problem;
    this->weight->rows_dot(w2, b2, hidden + n0 * p.r, p.r, gate + n0 * p.c, p.c, n1 - n0, c0, c1, p.r);
    for (int64_t n = n0; n < n1; ++n) {
      A* g = gate + n * p.c + c0;
      this->function->apply(this->options.gate, this->options.gate_p0, this->options.gate_p1, g, g, c1 - c0);
    }
  }

  void scale(int64_t n, int64_t r0, int64_t r1) const {  // (E4)
    const Problem& p = this->problem;
    const ScaleArgs<A> args{x + this->bytes(n * x_stride),
                            gate + n * p.c,
                            residual != nullptr ? residual + this->bytes(n * residual_stride) : nullptr,
                            y + this->bytes(n * p.c * p.m),
                            mask != nullptr ? mask + n * this->mask_bytes() : nullptr,
                            this->rows(),
                            this->columns(),
                            this->options.relu,
                            this->plan.stream_stores};
    (p.channels_last ? this->tensor->scale_pixels : this->tensor->scale_planes)(args, r0, r1);
  }

  void run() const {
    const Problem& p = this->problem;
    const Scratch<A> hidden(p.n * p.r);
    if (this->plan.strategy == CpuStrategy::phases) {
      this->over_pieces(p.c, 16, [&](int64_t n, int64_t c0, int64_t c1) {
        const Scratch<A> scratch(2 * p.c);
        squeeze(n, c0, c1, scratch.get());
      });
      this->over_blocks(p.r, [&](int64_t r0, int64_t r1) { reduce(0, p.n, r0, r1, hidden.get()); });
      this->over_blocks(p.c, [&](int64_t c0, int64_t c1) { expand(0, p.n, c0, c1, hidden.get()); });
      this->over_pieces(this->rows(), 1, [&](int64_t n, int64_t r0, int64_t r1) { scale(n, r0, r1); });
      return;
    }
    this->over_samples([&](int64_t n, A* scratch) { squeeze(n, 0, p.c, scratch); },
                       [&](int64_t n0, int64_t n1) {
                         reduce(n0, n1, 0, p.r, hidden.get());
                         expand(n0, n1, 0, p.c, hidden.get());
                       },
                       [&](int64_t n) { scale(n, 0, this->rows()); });
  }
};

// ------------------------------------------------------------------------------------------------ backward

template <class A>
struct Backward : Layer<A> {
  const char* dy;
  int64_t dy_stride;
  const A* dgate;  // what reaches the returned gate, or null
  const char* x;
  int64_t x_stride;
  const void* w1;
  const void* w2;
  const A* gate;
  const A* saved;
  const uint8_t* mask;
  char* dx;  // every output may be null
  void* dw1;
  A* db1;
  void* dw2;
  A* db2;
  char* dresidual;

  const A* pooled(int64_t n) const { return saved + n * this->saved_stride(); }
  const A* preact(int64_t n) const { return pooled(n) + this->problem.c; }
  const A* peak(int64_t n) const { return preact(n) + this->problem.r; }
  const A* ties(int64_t n) const { return peak(n) + this->problem.c; }
  int64_t sample(int64_t n) const { return this->bytes(n * this->problem.c * this->problem.m); }

  void squeeze(int64_t n, int64_t c0, int64_t c1, A* dlogit, A* scratch) const {  // (B1), (B2), (B3)
    const Problem& p = this->problem;
    const DotArgs<A> args{dy + this->bytes(n * dy_stride),
                          x + this->bytes(n * x_stride),
                          mask != nullptr ? mask + n * this->mask_bytes() : nullptr,
                          dresidual != nullptr ? dresidual + sample(n) : nullptr,
                          this->rows(),
                          this->columns()};
    A* out = dlogit + n * p.c;
    if (p.channels_last)
      this->tensor->dot_pixels(args, c0, c1, out, scratch);
    else
      this->tensor->dot_planes(args, c0, c1, out);
    if (dgate != nullptr)
      for (int64_t c = c0; c < c1; ++c) out[c] += dgate[n * p.c + c];
    this->function->backward_from_output(this->options.gate, this->options.gate_p0, this->options.gate_p1,
                                         gate + n * p.c + c0, out + c0, out + c0, c1 - c0);
  }

  void expand(int64_t n0, int64_t n1, int64_t r0, int64_t r1, const A* dlogit, A* dpreact) const {  // (B4)
    const Problem& p = this->problem;
    this->weight->columns_dot(w2, p.r, dlogit + n0 * p.c, p.c, dpreact + n0 * p.r, p.r, n1 - n0, r0, r1, p.c);
    for (int64_t n = n0; n < n1; ++n) {
      A* d = dpreact + n * p.r + r0;
      this->function->backward(this->options.act, this->options.act_p0, 0, preact(n) + r0, d, d, r1 - r0);
    }
  }

  // (B5), and what each position of a channel gets from it: `at_peak` where the maximum is attained, else `shift`.
  void reduce(int64_t n0, int64_t n1, int64_t c0, int64_t c1, const A* dpreact, A* shift, A* at_peak) const {
    const Problem& p = this->problem;
    this->weight->columns_dot(w1, p.c, dpreact + n0 * p.r, p.r, shift + n0 * p.c, p.c, n1 - n0, c0, c1, p.r);
    const Squeeze kind = this->options.squeeze;
    const A part = kind == Squeeze::avgmax ? A(0.5) : A(1), mean = part / static_cast<A>(p.m);
    for (int64_t n = n0; n < n1; ++n) {
      A* s = shift + n * p.c;
      if (kind == Squeeze::avg) {
        for (int64_t c = c0; c < c1; ++c) s[c] *= mean;
        continue;
      }
      for (int64_t c = c0; c < c1; ++c) {
        const A share = s[c] * part / ties(n)[c], rest = kind == Squeeze::avgmax ? s[c] * mean : A(0);
        at_peak[n * p.c + c] = rest + share;
        // As torch.amax, whose gradient is share * [x == maximum]: one that is not finite (a plane with NaN has no
        // ties) makes NaN of every other position.
        s[c] = rest + share * A(0);
      }
    }
  }

  void apply(int64_t n, int64_t r0, int64_t r1, const A* shift, const A* at_peak) const {  // (B6)
    const Problem& p = this->problem;
    const bool masked_already = mask != nullptr && dresidual != nullptr;
    const ApplyArgs<A> args{masked_already ? dresidual + sample(n) : dy + this->bytes(n * dy_stride),
                            mask != nullptr && !masked_already ? mask + n * this->mask_bytes() : nullptr,
                            this->has_peak() ? x + this->bytes(n * x_stride) : nullptr,
                            gate + n * p.c,
                            shift + n * p.c,
                            this->has_peak() ? peak(n) : nullptr,
                            at_peak + n * p.c,
                            dx + sample(n),
                            this->rows(),
                            this->columns(),
                            this->plan.stream_stores};
    (p.channels_last ? this->tensor->apply_pixels : this->tensor->apply_planes)(args, r0, r1);
  }

  void weights(const A* dlogit, const A* dpreact) const {  // (B7)
    const Problem& p = this->problem;
    const Scratch<A> hidden(p.n * p.r);
    for (int64_t n = 0; n < p.n; ++n)
      this->function->apply(this->options.act, this->options.act_p0, 0, preact(n), hidden.get() + n * p.r, p.r);
    const auto sum_over_samples = [&p](const A* d, int64_t stride, A* out) {
      std::fill(out, out + stride, A(0));
      for (int64_t n = 0; n < p.n; ++n)
        for (int64_t i = 0; i < stride; ++i) out[i] += d[n * stride + i];
    };
    if (db1 != nullptr) sum_over_samples(dpreact, p.r, db1);
    if (db2 != nullptr) sum_over_samples(dlogit, p.c, db2);
    const auto rows1 = [&](int64_t r0, int64_t r1) {
      this->weight->outer_sum(dpreact, p.r, saved, this->saved_stride(), dw1, p.n, r0, r1, p.c);
    };
    const auto rows2 = [&](int64_t c0, int64_t c1) {
      this->weight->outer_sum(dlogit, p.c, hidden.get(), p.r, dw2, p.n, c0, c1, p.r);
    };
    if (this->plan.strategy == CpuStrategy::serial) {
      rows1(0, p.r);
      rows2(0, p.c);
      return;
    }
    // Both halves cost n * c * r: part i of kParts is a share of the rows of each.
    constexpr int64_t kParts = 64;
    parallel_over(this->parallel_for, kParts, [&](int64_t begin, int64_t end) {
      rows1(p.r * begin / kParts, p.r * end / kParts);
      rows2(p.c * begin / kParts, p.c * end / kParts);
    });
  }

  void run() const {
    const Problem& p = this->problem;
    const Scratch<A> dlogit(p.n * p.c), dpreact(p.n * p.r), shift(p.n * p.c);
    const Scratch<A> at_peak(this->has_peak() ? p.n * p.c : 0);
    const bool into_x = dx != nullptr;
    if (this->plan.strategy == CpuStrategy::phases) {
      this->over_pieces(p.c, 16, [&](int64_t n, int64_t c0, int64_t c1) {
        const Scratch<A> scratch(2 * p.c);
        squeeze(n, c0, c1, dlogit.get(), scratch.get());
      });
      this->over_blocks(p.r, [&](int64_t r0, int64_t r1) { expand(0, p.n, r0, r1, dlogit.get(), dpreact.get()); });
      if (into_x) {
        this->over_blocks(
            p.c, [&](int64_t c0, int64_t c1) { reduce(0, p.n, c0, c1, dpreact.get(), shift.get(), at_peak.get()); });
        this->over_pieces(this->rows(), 1,
                          [&](int64_t n, int64_t r0, int64_t r1) { apply(n, r0, r1, shift.get(), at_peak.get()); });
      }
    } else {
      this->over_samples([&](int64_t n, A* scratch) { squeeze(n, 0, p.c, dlogit.get(), scratch); },
                         [&](int64_t n0, int64_t n1) {
                           expand(n0, n1, 0, p.r, dlogit.get(), dpreact.get());
                           if (into_x) reduce(n0, n1, 0, p.c, dpreact.get(), shift.get(), at_peak.get());
                         },
                         [&](int64_t n) {
                           if (into_x) apply(n, 0, this->rows(), shift.get(), at_peak.get());
                         });
    }
    if (dw1 != nullptr) weights(dlogit.get(), dpreact.get());
  }
};

}  // namespace senet
