// The order of an SE layer's stages over samples and threads, for one plan.
#pragma once
#include "layer.h"

namespace senet {

// ------------------------------------------------------------------------------------------------ forward

template <class A>
struct Forward : Layer<A> {
  const char* x;
  int64_t x_stride;
  const A* b1;
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
    const int64_t stride = this->saved_stride();
    Layer<A>::reduce(b1, pooled(0), stride, preact(0), stride, hidden, n0, n1, r0, r1);
  }

  void expand(int64_t n0, int64_t n1, int64_t c0, int64_t c1, const A* hidden) const {  // (E3)
    Layer<A>::expand(b2, hidden, gate, n0, n1, c0, c1);
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
    this->expand_backward(dlogit, preact(0), this->saved_stride(), dpreact, n0, n1, r0, r1);
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
    const int64_t stride = this->saved_stride();
    this->weight_gradients(dlogit, dpreact, pooled(0), stride, preact(0), stride, dw1, db1, dw2, db2);
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
