// The order of the stages over samples and threads, for one plan: senet_fused/reference.py, (E1) to (E4) and (B1) to
// (B7); with a norm in front (T1) to (T7), with an activation behind it (P1) to (P6). Statistics of the batch need
// every sample, so with a norm all threads share each stage, with a barrier behind it. Between (P1) and (P2) none is
// needed.
#pragma once
#include <cmath>

#include "layer.h"

namespace senet {

// ------------------------------------------------------------------------------------------------ forward

// (T1): xbar, and the statistics of the batch unless they are given.
template <class A>
struct Moments : Layer<A> {
  A* xbar;  // [n, c] with this stride, or null
  int64_t xbar_stride;
  A* out;  // the statistics, or null: they are given
  double eps;

  // The means are doubles: of float means that are large, differences between samples would be rounding errors.
  void merge(const double* means, const A* squares, int64_t c0, int64_t c1) const {
    constexpr int64_t kChannels = 16;
    const Problem& p = this->problem;
    const double count = double(p.n) * double(p.m);
    for (int64_t begin = c0; begin < c1; begin += kChannels) {
      const int64_t channels = std::min(kChannels, c1 - begin);
      double mean[kChannels] = {}, total[kChannels] = {};
      for (int64_t n = 0; n < p.n; ++n)
        for (int64_t i = 0; i < channels; ++i) mean[i] += means[n * p.c + begin + i];
      for (int64_t i = 0; i < channels; ++i) mean[i] /= double(p.n);
      for (int64_t n = 0; n < p.n; ++n)
        for (int64_t i = 0; i < channels; ++i) {
          const double d = means[n * p.c + begin + i] - mean[i];
          total[i] += squares[n * p.c + begin + i] + double(p.m) * d * d;
        }
      for (int64_t i = 0; i < channels; ++i) {
        A* of_channel = out + begin + i;
        of_channel[0] = A(mean[i]);
        of_channel[p.c] = A(1 / std::sqrt(total[i] / count + eps));
        of_channel[2 * p.c] = A(count > 1 ? total[i] / (count - 1) : 0);
      }
    }
  }

  void run() const {
    const Problem& p = this->problem;
    const Scratch<double> means(p.n * p.c);
    const Scratch<A> squares(p.n * p.c);
    this->over_pieces(p.c, 16, [&](int64_t n, int64_t c0, int64_t c1) {
      const void* sample = this->sample(this->x, n, this->x_stride);
      double* mean = means.get() + n * p.c;
      if (p.channels_last) {
        const Scratch<double> scratch(2 * p.c);
        this->tensor->moments_pixels(sample, p.c, p.m, c0, c1, mean, squares.get() + n * p.c, scratch.get());
      } else {
        this->tensor->moments_planes(sample, p.m, c0, c1, mean, squares.get() + n * p.c);
      }
      if (xbar != nullptr)
        for (int64_t c = c0; c < c1; ++c) xbar[n * xbar_stride + c] = A(mean[c]);
    });
    if (out != nullptr)
      this->over_blocks(p.c, [&](int64_t c0, int64_t c1) { merge(means.get(), squares.get(), c0, c1); });
  }
};

// (E1) to (E4); after Moments, with a norm (T2) and (T3), with an activation, too, (P1) and (P2).
template <class A>
struct Forward : Layer<A> {
  const A* b1;
  const A* b2;
  const char* residual;
  int64_t residual_stride;
  char* y;
  A* gate_out;  // what `gate` points to
  A* saved;     // with a norm alone its first columns, xbar, are there
  uint8_t* mask;

  A* pooled(int64_t n) const { return saved + n * this->saved_stride(); }
  A* preact(int64_t n) const { return pooled(n) + this->problem.c; }
  A* peak(int64_t n) const { return preact(n) + this->problem.r; }
  A* ties(int64_t n) const { return peak(n) + this->problem.c; }

  void squeeze(int64_t n, int64_t c0, int64_t c1, A* scratch) const {  // (E1)
    const Problem& p = this->problem;
    const Squeeze kind = this->options.squeeze;
    const void* sample = this->sample(this->x, n, this->x_stride);
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

  // From the pooled values with this row stride.
  void reduce(const A* pooled, int64_t stride, A* hidden, int64_t n0, int64_t n1, int64_t r0, int64_t r1) const {
    Layer<A>::reduce(b1, pooled, stride, preact(0), this->saved_stride(), hidden, n0, n1, r0, r1);  // (E2)
  }

  void expand(const A* hidden, int64_t n0, int64_t n1, int64_t c0, int64_t c1) const {  // (E3)
    Layer<A>::expand(b2, hidden, gate_out, n0, n1, c0, c1);
  }

  // (E4), (T3). shifts: null without a norm.
  void scale(int64_t n, int64_t r0, int64_t r1, const A* scales, const A* shifts) const {
    const bool norm = this->statistics != nullptr;
    const ScaleArgs<A> args{this->sample(this->x, n, this->x_stride),
                            norm ? this->mean() : nullptr,
                            scales + this->row(n),
                            norm ? shifts + this->row(n) : nullptr,
                            residual != nullptr ? this->sample(residual, n, residual_stride) : nullptr,
                            y + this->dense(n),
                            const_cast<uint8_t*>(this->bits(mask, n)),
                            this->rows(),
                            this->columns(),
                            this->options.relu,
                            this->plan.stream_stores};
    (this->problem.channels_last ? this->tensor->scale_pixels : this->tensor->scale_planes)(args, r0, r1);
  }

  void run() const {
    const Problem& p = this->problem;
    const Scratch<A> hidden(p.n * p.r);
    if (this->has_pre_act()) {
      run_with_pre_act(hidden.get());
    } else if (this->statistics != nullptr) {
      run_with_norm(hidden.get());
    } else {
      run_stages(
          hidden.get(), [&](int64_t n, int64_t c0, int64_t c1, A* scratch) { squeeze(n, c0, c1, scratch); },
          [](int64_t, int64_t, int64_t) {},
          [&](int64_t n, int64_t r0, int64_t r1) { scale(n, r0, r1, this->gate, nullptr); });
    }
  }

  // Where samples need nothing of each other. pool(sample, channels, scratch) and scale(sample, rows) are the sweeps;
  // branch(sample, channels) comes behind the gate.
  template <class Pool, class Branch, class Scale>
  void run_stages(A* hidden, const Pool& pool, const Branch& branch, const Scale& scale) const {
    const Problem& p = this->problem;
    const int64_t stride = this->saved_stride();
    if (this->plan.strategy == CpuStrategy::phases) {
      this->over_pieces(p.c, 16, [&](int64_t n, int64_t c0, int64_t c1) {
        const Scratch<A> scratch(2 * p.c);
        pool(n, c0, c1, scratch.get());
      });
      this->over_blocks(p.r, [&](int64_t r0, int64_t r1) { reduce(saved, stride, hidden, 0, p.n, r0, r1); });
      this->over_blocks(p.c, [&](int64_t c0, int64_t c1) {
        expand(hidden, 0, p.n, c0, c1);
        for (int64_t n = 0; n < p.n; ++n) branch(n, c0, c1);
      });
      this->template over_pieces<true>(this->rows(), 1, scale);
      return;
    }
    this->over_samples([&](int64_t n, A* scratch) { pool(n, 0, p.c, scratch); },
                       [&](int64_t n0, int64_t n1) {
                         reduce(saved, stride, hidden, n0, n1, 0, p.r);
                         expand(hidden, n0, n1, 0, p.c);
                         for (int64_t n = n0; n < n1; ++n) branch(n, 0, p.c);
                       },
                       [&](int64_t n) { scale(n, 0, this->rows()); });
  }

  void run_with_pre_act(A* hidden) const {
    const Problem& p = this->problem;
    const Scratch<A> affine(2 * p.c), scales(this->per_sample() ? p.n * p.c : 0);
    this->affine(affine.get());
    const auto pool = [&](int64_t n, int64_t c0, int64_t c1, A*) {  // (P1)
      const Scratch<double> totals(p.channels_last ? p.c : 0);
      ActivatedArgs<A> args = this->activated(n, affine.get());
      args.sums = pooled(n);
      (p.channels_last ? this->tensor->activated_sum_pixels : this->tensor->activated_sum_planes)(args, c0, c1,
                                                                                                  totals.get());
      for (int64_t c = c0; c < c1; ++c) args.sums[c] /= static_cast<A>(p.m);
    };
    const auto branch = [&](int64_t n, int64_t c0, int64_t c1) { this->branches(scales.get(), n, c0, c1); };
    const auto apply = [&](int64_t n, int64_t r0, int64_t r1) {  // (P2)
      ActivatedArgs<A> args = this->activated(n, affine.get());
      args.scale = this->per_sample() ? scales.get() + n * p.c : nullptr;
      args.residual = residual != nullptr ? this->sample(residual, n, residual_stride) : nullptr;
      args.y = y + this->dense(n);
      args.mask_out = const_cast<uint8_t*>(this->bits(mask, n));
      args.relu = this->options.relu;
      (p.channels_last ? this->tensor->activated_scale_pixels : this->tensor->activated_scale_planes)(args, r0, r1);
    };
    if (p.r > 0) {
      run_stages(hidden, pool, branch, apply);
      return;
    }
    if (this->per_sample())
      for (int64_t n = 0; n < p.n; ++n) branch(n, 0, p.c);
    this->template over_pieces<true>(this->rows(), 1, apply);
  }

  void run_with_norm(A* hidden) const {
    const Problem& p = this->problem;
    const int64_t samples = this->per_sample() ? p.n : 1;
    const Scratch<A> scales(samples * p.c), shifts(samples * p.c);
    if (p.r > 0) {
      const Scratch<A> pooled(p.n * p.c);
      this->over_blocks(p.c,
                        [&](int64_t c0, int64_t c1) { this->pool(saved, this->saved_stride(), pooled.get(), c0, c1); });
      this->over_blocks(p.r, [&](int64_t r0, int64_t r1) { reduce(pooled.get(), p.c, hidden, 0, p.n, r0, r1); });
    }
    this->over_blocks(p.c, [&](int64_t c0, int64_t c1) {
      if (p.r > 0) expand(hidden, 0, p.n, c0, c1);
      this->scales(scales.get(), c0, c1);
      for (int64_t n = 0; n < samples; ++n)
        for (int64_t c = c0; c < c1; ++c)
          shifts.get()[n * p.c + c] = this->bias != nullptr ? this->bias[c] * this->branch(n, c) : A(0);
    });
    this->template over_pieces<true>(
        this->rows(), 1, [&](int64_t n, int64_t r0, int64_t r1) { scale(n, r0, r1, scales.get(), shifts.get()); });
  }
};

// ------------------------------------------------------------------------------------------------ backward

// What every stage of a backward reads.
template <class A>
struct BackwardLayer : Layer<A> {
  const char* dy;
  int64_t dy_stride;
  const A* saved;
  const uint8_t* mask;

  const A* pooled(int64_t n) const { return saved + n * this->saved_stride(); }
  const A* preact(int64_t n) const { return pooled(n) + this->problem.c; }

  // (B3), from dgate, in place.
  void through_gate(int64_t n, int64_t c0, int64_t c1, A* dgate) const {
    const int64_t at = n * this->problem.c + c0;
    this->function->backward_from_output(this->options.gate, this->options.gate_p0, this->options.gate_p1,
                                         this->gate + at, dgate + at, dgate + at, c1 - c0);
  }

  void expand(int64_t n0, int64_t n1, int64_t r0, int64_t r1, const A* dlogit, A* dpreact) const {  // (B4)
    this->expand_backward(dlogit, preact(0), this->saved_stride(), dpreact, n0, n1, r0, r1);
  }

  void second_sweep(const GradientArgs<A>& args, int64_t r0, int64_t r1) const {  // (B6), (T7)
    (this->problem.channels_last ? this->tensor->gradient_pixels : this->tensor->gradient_planes)(args, r0, r1);
  }
};

// Without a norm: (B1) to (B7).
template <class A>
struct Backward : BackwardLayer<A> {
  const A* dgate;  // what reaches the returned gate, or null
  char* dx;        // every output may be null
  void* dw1;
  A* db1;
  void* dw2;
  A* db2;
  char* dresidual;

  const A* peak(int64_t n) const { return this->preact(n) + this->problem.r; }
  const A* ties(int64_t n) const { return peak(n) + this->problem.c; }

  void squeeze(int64_t n, int64_t c0, int64_t c1, A* dlogit, A* scratch) const {  // (B1), (B2), (B3)
    const Problem& p = this->problem;
    const DotArgs<A> args{this->sample(this->dy, n, this->dy_stride),
                          this->sample(this->x, n, this->x_stride),
                          this->bits(this->mask, n),
                          dresidual != nullptr ? dresidual + this->dense(n) : nullptr,
                          this->rows(),
                          this->columns()};
    A* out = dlogit + n * p.c;
    if (p.channels_last)
      this->tensor->dot_pixels(args, c0, c1, out, scratch);
    else
      this->tensor->dot_planes(args, c0, c1, out);
    if (dgate != nullptr)
      for (int64_t c = c0; c < c1; ++c) out[c] += dgate[n * p.c + c];
    this->through_gate(n, c0, c1, dlogit);
  }

  // (B5), and what each position of a channel gets from it: `at_peak` where the maximum is attained, else `shift`.
  void reduce(int64_t n0, int64_t n1, int64_t c0, int64_t c1, const A* dpreact, A* shift, A* at_peak) const {
    const Problem& p = this->problem;
    this->reduce_backward(dpreact, shift, n0, n1, c0, c1);
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
    const bool masked_already = this->mask != nullptr && dresidual != nullptr;
    const int64_t row = n * this->problem.c;
    GradientArgs<A> args{};
    args.dy = masked_already ? dresidual + this->dense(n) : this->sample(this->dy, n, this->dy_stride);
    args.mask = masked_already ? nullptr : this->bits(this->mask, n);
    args.scale = this->gate + row;
    args.shift = shift + row;
    if (this->has_peak()) {
      args.x = this->sample(this->x, n, this->x_stride);
      args.peak = peak(n);
      args.at_peak = at_peak + row;
    }
    args.dx = dx + this->dense(n);
    args.rows = this->rows();
    args.columns = this->columns();
    args.stream = this->plan.stream_stores;
    this->second_sweep(args, r0, r1);
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
      this->over_blocks(p.r,
                        [&](int64_t r0, int64_t r1) { this->expand(0, p.n, r0, r1, dlogit.get(), dpreact.get()); });
      if (into_x) {
        this->over_blocks(
            p.c, [&](int64_t c0, int64_t c1) { reduce(0, p.n, c0, c1, dpreact.get(), shift.get(), at_peak.get()); });
        this->template over_pieces<true>(
            this->rows(), 1, [&](int64_t n, int64_t r0, int64_t r1) { apply(n, r0, r1, shift.get(), at_peak.get()); });
      }
    } else {
      this->over_samples([&](int64_t n, A* scratch) { squeeze(n, 0, p.c, dlogit.get(), scratch); },
                         [&](int64_t n0, int64_t n1) {
                           this->expand(n0, n1, 0, p.r, dlogit.get(), dpreact.get());
                           if (into_x) reduce(n0, n1, 0, p.c, dpreact.get(), shift.get(), at_peak.get());
                         },
                         [&](int64_t n) {
                           if (into_x) apply(n, 0, this->rows(), shift.get(), at_peak.get());
                         });
    }
    const int64_t stride = this->saved_stride();
    if (dw1 != nullptr)
      this->weight_gradients(dlogit.get(), dpreact.get(), this->pooled(0), stride, this->preact(0), stride, dw1, db1,
                             dw2, db2);
  }
};

// With a norm, first sweep: (T4), (T5), (B3) to (B5), (B7), (T6); with an activation behind it (P3) to (P5).
template <class A>
struct GradientSums : BackwardLayer<A> {
  A* dweight;  // [c]
  A* dbias;    // [c]
  A* dpooled;  // [n, c], gated
  void* dw1;   // these may be null
  A* db1;
  void* dw2;
  A* db2;

  void run() const {
    if (this->has_pre_act())
      run_with_pre_act();
    else
      run_with_norm();
  }

  // (T6), and the factors of (T4) before it. dlogit becomes dgate.
  void finish(A* g0, A* g1, A* dlogit, int64_t c0, int64_t c1) const {
    const Problem& p = this->problem;
    for (int64_t n = 0; n < p.n; ++n) {
      const A f = this->factor != nullptr ? this->factor[n] : A(1);
      const int64_t at = n * p.c;
      for (int64_t c = c0; c < c1; ++c) {
        g0[at + c] *= f;
        g1[at + c] *= f * this->rstd()[c];
      }
      if (this->gate == nullptr) continue;
      for (int64_t c = c0; c < c1; ++c)  // (T5)
        dlogit[at + c] = (this->weight != nullptr ? this->weight[c] : A(1)) * g1[at + c] +
                         (this->bias != nullptr ? this->bias[c] * g0[at + c] : A(0));
      this->through_gate(n, c0, c1, dlogit);
    }
  }

  void reduce_samples(const A* g0, const A* g1, int64_t c0, int64_t c1) const {  // (T6)
    constexpr int64_t kChannels = 16;
    const Problem& p = this->problem;
    for (int64_t begin = c0; begin < c1; begin += kChannels) {
      const int64_t channels = std::min(kChannels, c1 - begin);
      double of_weight[kChannels] = {}, of_bias[kChannels] = {};
      for (int64_t n = 0; n < p.n; ++n) {
        const int64_t at = n * p.c + begin;
        for (int64_t i = 0; i < channels; ++i) {
          const double gate = this->gate != nullptr ? this->gate[at + i] : A(1);
          of_weight[i] += gate * g1[at + i];
          of_bias[i] += gate * g0[at + i];
        }
        if (this->gate == nullptr) continue;
        const A* xbar = this->pooled(n) + begin;
        for (int64_t i = 0; i < channels; ++i) {
          const double d = dpooled[at + i];
          of_weight[i] += d * this->rstd()[begin + i] * (xbar[i] - this->mean()[begin + i]);
          of_bias[i] += d;
        }
      }
      for (int64_t i = 0; i < channels; ++i) {
        dweight[begin + i] = A(of_weight[i]);
        dbias[begin + i] = A(of_bias[i]);
      }
    }
  }

  // S0 to S4, or S1 and S3, of all samples: each [n, c].
  void activated_moments(A* sums, const A* affine) const {
    const Problem& p = this->problem;
    const bool gated = this->gate != nullptr;
    this->over_pieces(p.c, 16, [&](int64_t n, int64_t c0, int64_t c1) {
      const Scratch<double> totals(p.channels_last ? (gated ? 5 : 2) * p.c : 0);
      ActivatedArgs<A> args = this->activated(n, affine);
      args.dy = this->sample(this->dy, n, this->dy_stride);
      args.mask = this->bits(this->mask, n);
      args.sums = sums + n * p.c;
      args.sums_stride = p.n * p.c;
      args.gated = gated;
      (p.channels_last ? this->tensor->activated_moments_pixels : this->tensor->activated_moments_planes)(args, c0, c1,
                                                                                                          totals.get());
    });
  }

  void parameters(const A* sums, int64_t c0, int64_t c1) const {  // (P5)
    const Problem& p = this->problem;
    const int64_t kind = p.n * p.c;
    const bool gated = this->gate != nullptr;
    const A *s1 = sums + (gated ? kind : 0), *s3 = sums + (gated ? 3 * kind : kind);
    for (int64_t c = c0; c < c1; ++c) {
      double of_weight = 0, of_bias = 0;
      for (int64_t n = 0; n < p.n; ++n) {
        const int64_t at = n * p.c + c;
        const double branch = this->branch(n, c);
        of_bias += branch * s1[at];
        of_weight += branch * s3[at];
        if (!gated) continue;
        const double pooled = this->dpooled[at] / double(p.m);
        of_bias += pooled * sums[2 * kind + at];
        of_weight += pooled * sums[4 * kind + at];
      }
      this->dbias[c] = A(of_bias);
      this->dweight[c] = A(of_weight * this->rstd()[c]);
    }
  }

  void run_with_pre_act() const {  // (P3), (P4), (B3) to (B5), (B7), (P5)
    const Problem& p = this->problem;
    const bool gated = this->gate != nullptr;
    const Scratch<A> affine(2 * p.c), sums((gated ? 5 : 2) * p.n * p.c), dpreact(p.n * p.r);
    this->affine(affine.get());
    activated_moments(sums.get(), affine.get());
    A* dlogit = sums.get();  // S0, whose place dlogit takes
    if (gated) {
      this->over_blocks(p.c, [&](int64_t c0, int64_t c1) {
        for (int64_t n = 0; n < p.n; ++n) {
          if (this->factor != nullptr)
            for (int64_t c = c0; c < c1; ++c) dlogit[n * p.c + c] *= this->factor[n];  // (P4)
          this->through_gate(n, c0, c1, dlogit);
        }
      });
      this->over_blocks(p.r, [&](int64_t r0, int64_t r1) { this->expand(0, p.n, r0, r1, dlogit, dpreact.get()); });
    }
    this->over_blocks(p.c, [&](int64_t c0, int64_t c1) {
      if (gated) this->reduce_backward(dpreact.get(), this->dpooled, 0, p.n, c0, c1);
      parameters(sums.get(), c0, c1);
    });
    const int64_t stride = this->saved_stride();
    if (this->dw1 != nullptr)
      this->weight_gradients(dlogit, dpreact.get(), this->pooled(0), stride, this->preact(0), stride, this->dw1,
                             this->db1, this->dw2, this->db2);
  }

  void run_with_norm() const {
    const Problem& p = this->problem;
    const int64_t stride = this->saved_stride();
    const Scratch<A> g0(p.n * p.c), g1(p.n * p.c);
    this->over_pieces(p.c, 16, [&](int64_t n, int64_t c0, int64_t c1) {
      const Scratch<double> scratch(p.channels_last ? 2 * p.c : 0);
      const MomentArgs<A> args{this->sample(this->dy, n, this->dy_stride),
                               this->sample(this->x, n, this->x_stride),
                               this->bits(this->mask, n),
                               this->mean(),
                               g0.get() + n * p.c,
                               g1.get() + n * p.c,
                               this->rows(),
                               this->columns()};
      (p.channels_last ? this->tensor->gradient_moments_pixels : this->tensor->gradient_moments_planes)(args, c0, c1,
                                                                                                        scratch.get());
    });
    const Scratch<A> dlogit(this->gate != nullptr ? p.n * p.c : 0), dpreact(p.n * p.r);
    const Scratch<A> pooled(dw1 != nullptr ? p.n * p.c : 0);
    this->over_blocks(p.c, [&](int64_t c0, int64_t c1) {
      finish(g0.get(), g1.get(), dlogit.get(), c0, c1);
      if (dw1 != nullptr) this->pool(this->saved, stride, pooled.get(), c0, c1);
    });
    if (this->gate != nullptr)
      this->over_blocks(p.r,
                        [&](int64_t r0, int64_t r1) { this->expand(0, p.n, r0, r1, dlogit.get(), dpreact.get()); });
    this->over_blocks(p.c, [&](int64_t c0, int64_t c1) {
      if (this->gate != nullptr) this->reduce_backward(dpreact.get(), dpooled, 0, p.n, c0, c1);
      reduce_samples(g0.get(), g1.get(), c0, c1);
    });
    if (dw1 != nullptr)
      this->weight_gradients(dlogit.get(), dpreact.get(), pooled.get(), p.c, this->preact(0), stride, dw1, db1, dw2,
                             db2);
  }
};

// With a norm, second sweep: (T7), with an activation behind it (P6).
template <class A>
struct Gradient : BackwardLayer<A> {
  const A* dweight;  // [c], of all processes
  const A* dbias;
  const A* dpooled;  // [n, c], gated
  double count;      // m, of all processes; 0: the statistics were given
  char* dx;
  char* dresidual;  // or null

  void run() const {
    if (this->has_pre_act())
      run_with_pre_act();
    else
      run_with_norm();
  }

  void run_with_pre_act() const {  // (P6)
    const Problem& p = this->problem;
    const bool batch = count > 0;
    const int64_t samples = this->per_sample() ? p.n : 1;
    const Scratch<A> affine(2 * p.c), scale(samples * p.c), slope(p.c), shift(p.c);
    const Scratch<A> pooled(dpooled != nullptr ? p.n * p.c : p.c);
    this->affine(affine.get());
    this->over_blocks(p.c, [&](int64_t c0, int64_t c1) {
      this->scales(scale.get(), c0, c1);
      for (int64_t c = c0; c < c1; ++c) {
        const double of_channel = affine.get()[c];
        slope.get()[c] = batch ? A(-of_channel * this->rstd()[c] * dweight[c] / count) : A(0);
        shift.get()[c] = batch ? A(-of_channel * dbias[c] / count) : A(0);
        if (dpooled == nullptr) pooled.get()[c] = 0;
        for (int64_t n = 0; dpooled != nullptr && n < p.n; ++n)
          pooled.get()[n * p.c + c] = A(of_channel * dpooled[n * p.c + c] / double(p.m));
      }
    });
    this->template over_pieces<true>(this->rows(), 1, [&](int64_t n, int64_t r0, int64_t r1) {
      ActivatedArgs<A> args = this->activated(n, affine.get());
      args.dy = this->sample(this->dy, n, this->dy_stride);
      args.mask = this->bits(this->mask, n);
      args.scale = scale.get() + this->row(n);
      args.pooled = pooled.get() + (dpooled != nullptr ? n * p.c : 0);
      args.slope = batch ? slope.get() : nullptr;
      args.shift = shift.get();
      args.dx = dx + this->dense(n);
      args.dresidual = dresidual != nullptr ? dresidual + this->dense(n) : nullptr;
      (p.channels_last ? this->tensor->activated_gradient_pixels : this->tensor->activated_gradient_planes)(args, r0,
                                                                                                            r1);
    });
  }

  void run_with_norm() const {  // (T7)
    const Problem& p = this->problem;
    const bool batch = count > 0;
    const int64_t samples = this->per_sample() ? p.n : 1;
    const Scratch<A> scale(samples * p.c), shift(samples * p.c), slope(p.c);
    this->over_blocks(p.c, [&](int64_t c0, int64_t c1) {
      this->scales(scale.get(), c0, c1);
      for (int64_t c = c0; c < c1; ++c)
        slope.get()[c] = batch ? A(-double(this->slope(c)) * this->rstd()[c] * dweight[c] / count) : A(0);
      for (int64_t n = 0; n < samples; ++n)
        for (int64_t c = c0; c < c1; ++c) {
          const double pooled = this->gate != nullptr ? dpooled[n * p.c + c] / double(p.m) : 0.0;
          shift.get()[n * p.c + c] = A(this->slope(c) * (pooled - (batch ? dbias[c] / count : 0.0)));
        }
    });
    this->template over_pieces<true>(this->rows(), 1, [&](int64_t n, int64_t r0, int64_t r1) {
      GradientArgs<A> args{};
      args.dy = this->sample(this->dy, n, this->dy_stride);
      args.mask = this->bits(this->mask, n);
      args.scale = scale.get() + this->row(n);
      args.shift = shift.get() + this->row(n);
      if (batch) {
        args.x = this->sample(this->x, n, this->x_stride);
        args.mean = this->mean();
        args.slope = slope.get();
      }
      args.dx = dx + this->dense(n);
      args.dresidual = dresidual != nullptr ? dresidual + this->dense(n) : nullptr;
      args.rows = this->rows();
      args.columns = this->columns();
      args.stream = this->plan.stream_stores;
      this->second_sweep(args, r0, r1);
    });
  }
};

}  // namespace senet
