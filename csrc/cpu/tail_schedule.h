// The order of a block tail's stages over samples and threads: senet_fused/reference.py, (T1) to (T7). Statistics
// of the batch need every sample, so each stage is shared by all threads, with a barrier behind it.
#pragma once
#include <cmath>

#include "layer.h"

namespace senet {

template <class A>
struct Tail : Layer<A> {
  bool gated;  // without, there is no excitation, and problem.r is 0
  const char* x;
  int64_t x_stride;
  const A* weight;      // [c] or null
  const A* bias;        // [c] or null
  const A* factor;      // [n] or null
  const A* statistics;  // [3, c]: mean, rstd, variance
  const A* gate;        // [n, c]

  int64_t row(int64_t n) const { return per_sample() ? n * this->problem.c : 0; }
  bool per_sample() const { return gated || factor != nullptr; }
  const A* mean() const { return statistics; }
  const A* rstd() const { return statistics + this->problem.c; }
  A slope(int64_t c) const { return weight != nullptr ? weight[c] * rstd()[c] : rstd()[c]; }
  const char* sample(const char* t, int64_t n, int64_t stride) const { return t + this->bytes(n * stride); }

  // (T2)
  void pool(const A* xbar, int64_t stride, A* pooled, int64_t c0, int64_t c1) const {
    const int64_t c = this->problem.c;
    for (int64_t n = 0; n < this->problem.n; ++n)
      for (int64_t i = c0; i < c1; ++i)
        pooled[n * c + i] = slope(i) * (xbar[n * stride + i] - mean()[i]) + (bias != nullptr ? bias[i] : A(0));
  }

  // A of (T3), for channels [c0, c1) of every sample, or once where samples do not differ.
  void scales(A* scale, int64_t c0, int64_t c1) const {
    const int64_t samples = per_sample() ? this->problem.n : 1;
    for (int64_t n = 0; n < samples; ++n)
      for (int64_t i = c0; i < c1; ++i) scale[row(n) + i] = slope(i) * branch(n, i);
  }

  // What multiplies BatchNorm's output.
  A branch(int64_t n, int64_t c) const {
    return (gated ? gate[n * this->problem.c + c] : A(1)) * (factor != nullptr ? factor[n] : A(1));
  }
};

// (T1): xbar, and the statistics of the batch unless they are given.
template <class A>
struct TailMoments : Layer<A> {
  const char* x;
  int64_t x_stride;
  A* xbar;  // [n, c] with this stride, or null
  int64_t xbar_stride;
  A* statistics;  // or null: they are given
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
        A* out = statistics + begin + i;
        out[0] = A(mean[i]);
        out[p.c] = A(1 / std::sqrt(total[i] / count + eps));
        out[2 * p.c] = A(count > 1 ? total[i] / (count - 1) : 0);
      }
    }
  }

  void run() const {
    const Problem& p = this->problem;
    const Scratch<double> means(p.n * p.c);
    const Scratch<A> squares(p.n * p.c);
    this->over_pieces(p.c, 16, [&](int64_t n, int64_t c0, int64_t c1) {
      const void* sample = x + this->bytes(n * x_stride);
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
    if (statistics != nullptr) {
      this->over_blocks(p.c, [&](int64_t c0, int64_t c1) { merge(means.get(), squares.get(), c0, c1); });
    }
  }
};

// (T2), (E2), (E3), (T3)
template <class A>
struct TailForward : Tail<A> {
  const A* b1;
  const A* b2;
  const char* residual;
  int64_t residual_stride;
  char* y;
  A* gate_out;
  A* saved;  // [n, c + r]: xbar, which is there, and preact
  uint8_t* mask;

  void run() const {
    const Problem& p = this->problem;
    const int64_t stride = p.c + p.r;
    const int64_t samples = this->per_sample() ? p.n : 1;
    const Scratch<A> scale(samples * p.c), shift(samples * p.c), hidden(p.n * p.r);
    if (this->gated) {
      const Scratch<A> pooled(p.n * p.c);
      this->over_blocks(p.c, [&](int64_t c0, int64_t c1) { this->pool(saved, stride, pooled.get(), c0, c1); });
      this->over_blocks(p.r, [&](int64_t r0, int64_t r1) {
        this->reduce(b1, pooled.get(), p.c, saved + p.c, stride, hidden.get(), 0, p.n, r0, r1);
      });
    }
    this->over_blocks(p.c, [&](int64_t c0, int64_t c1) {
      if (this->gated) this->expand(b2, hidden.get(), gate_out, 0, p.n, c0, c1);
      this->scales(scale.get(), c0, c1);
      for (int64_t n = 0; n < samples; ++n)
        for (int64_t c = c0; c < c1; ++c)
          shift.get()[n * p.c + c] = this->bias != nullptr ? this->bias[c] * this->branch(n, c) : A(0);
    });
    this->template over_pieces<true>(this->rows(), 1, [&](int64_t n, int64_t r0, int64_t r1) {
      const TailArgs<A> args{this->sample(this->x, n, this->x_stride),
                             this->mean(),
                             scale.get() + this->row(n),
                             shift.get() + this->row(n),
                             residual != nullptr ? this->sample(residual, n, residual_stride) : nullptr,
                             y + this->bytes(n * p.c * p.m),
                             mask != nullptr ? mask + n * this->mask_bytes() : nullptr,
                             this->rows(),
                             this->columns(),
                             this->options.relu,
                             this->plan.stream_stores};
      (p.channels_last ? this->tensor->tail_pixels : this->tensor->tail_planes)(args, r0, r1);
    });
  }
};

// (T4), (T5), (B3) to (B5), (B7), (T6)
template <class A>
struct TailSums : Tail<A> {
  const char* dy;
  int64_t dy_stride;
  const uint8_t* mask;
  const A* saved;
  A* dweight;  // [c]
  A* dbias;    // [c]
  A* dpooled;  // [n, c], gated
  void* dw1;   // these may be null
  A* db1;
  void* dw2;
  A* db2;

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
      if (!this->gated) continue;
      for (int64_t c = c0; c < c1; ++c)  // (T5)
        dlogit[at + c] = (this->weight != nullptr ? this->weight[c] : A(1)) * g1[at + c] +
                         (this->bias != nullptr ? this->bias[c] * g0[at + c] : A(0));
      this->function->backward_from_output(this->options.gate, this->options.gate_p0, this->options.gate_p1,
                                           this->gate + at + c0, dlogit + at + c0, dlogit + at + c0, c1 - c0);
    }
  }

  void reduce_samples(const A* g0, const A* g1, int64_t c0, int64_t c1) const {  // (T6)
    constexpr int64_t kChannels = 16;
    const Problem& p = this->problem;
    const int64_t stride = p.c + p.r;
    for (int64_t begin = c0; begin < c1; begin += kChannels) {
      const int64_t channels = std::min(kChannels, c1 - begin);
      double of_weight[kChannels] = {}, of_bias[kChannels] = {};
      for (int64_t n = 0; n < p.n; ++n) {
        const int64_t at = n * p.c + begin;
        for (int64_t i = 0; i < channels; ++i) {
          const double gate = this->gated ? this->gate[at + i] : A(1);
          of_weight[i] += gate * g1[at + i];
          of_bias[i] += gate * g0[at + i];
        }
        if (!this->gated) continue;
        const A* xbar = saved + n * stride + begin;
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

  void run() const {
    const Problem& p = this->problem;
    const int64_t stride = p.c + p.r;
    const Scratch<A> g0(p.n * p.c), g1(p.n * p.c);
    this->over_pieces(p.c, 16, [&](int64_t n, int64_t c0, int64_t c1) {
      const Scratch<double> scratch(p.channels_last ? 2 * p.c : 0);
      const TailSumsArgs<A> args{this->sample(dy, n, dy_stride),
                                 this->sample(this->x, n, this->x_stride),
                                 mask != nullptr ? mask + n * this->mask_bytes() : nullptr,
                                 this->mean(),
                                 g0.get() + n * p.c,
                                 g1.get() + n * p.c,
                                 this->rows(),
                                 this->columns()};
      (p.channels_last ? this->tensor->tail_sums_pixels : this->tensor->tail_sums_planes)(args, c0, c1, scratch.get());
    });
    const Scratch<A> dlogit(this->gated ? p.n * p.c : 0), dpreact(p.n * p.r);
    const Scratch<A> pooled(dw1 != nullptr ? p.n * p.c : 0);
    this->over_blocks(p.c, [&](int64_t c0, int64_t c1) {
      finish(g0.get(), g1.get(), dlogit.get(), c0, c1);
      if (dw1 != nullptr) this->pool(saved, stride, pooled.get(), c0, c1);
    });
    if (this->gated)
      this->over_blocks(p.r, [&](int64_t r0, int64_t r1) {
        this->expand_backward(dlogit.get(), saved + p.c, stride, dpreact.get(), 0, p.n, r0, r1);
      });
    this->over_blocks(p.c, [&](int64_t c0, int64_t c1) {
      if (this->gated) this->reduce_backward(dpreact.get(), dpooled, 0, p.n, c0, c1);
      reduce_samples(g0.get(), g1.get(), c0, c1);
    });
    if (dw1 != nullptr) {
      this->weight_gradients(dlogit.get(), dpreact.get(), pooled.get(), p.c, saved + p.c, stride, dw1, db1, dw2, db2);
    }
  }
};

// (T7)
template <class A>
struct TailGradient : Tail<A> {
  const char* dy;
  int64_t dy_stride;
  const uint8_t* mask;
  const A* dweight;  // [c], of all processes
  const A* dbias;
  const A* dpooled;  // [n, c], gated
  double count;      // m, of all processes; 0: the statistics were given
  char* dx;
  char* dresidual;  // or null

  void run() const {
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
          const double pooled = this->gated ? dpooled[n * p.c + c] / double(p.m) : 0.0;
          shift.get()[n * p.c + c] = A(this->slope(c) * (pooled - (batch ? dbias[c] / count : 0.0)));
        }
    });
    this->template over_pieces<true>(this->rows(), 1, [&](int64_t n, int64_t r0, int64_t r1) {
      const int64_t dense = this->bytes(n * p.c * p.m);
      const TailBackwardArgs<A> args{this->sample(dy, n, dy_stride),
                                     mask != nullptr ? mask + n * this->mask_bytes() : nullptr,
                                     this->sample(this->x, n, this->x_stride),
                                     this->mean(),
                                     scale.get() + this->row(n),
                                     batch ? slope.get() : nullptr,
                                     shift.get() + this->row(n),
                                     dx + dense,
                                     dresidual != nullptr ? dresidual + dense : nullptr,
                                     this->rows(),
                                     this->columns(),
                                     this->plan.stream_stores};
      (p.channels_last ? this->tensor->tail_backward_pixels : this->tensor->tail_backward_planes)(args, r0, r1);
    });
  }
};

}  // namespace senet
