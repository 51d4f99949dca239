// The elementwise functions and their derivatives, a group at a time: for float by polynomials, for double by the C
// library, lane by lane.
//
// Values and slopes of float are within a few units in the last place of the true ones wherever they are normal
// numbers, in the tails too: what decays like e^-a is computed from e^-a, never as a difference such as 1 - tanh.
// Infinities, NaN and kinks are as in torch. tests/test_functions.py has the bounds.
#pragma once
#include "../kernels.h"
#include "../vec.h"

namespace senet {
namespace SENET_ISA {

template <class A>
constexpr A by_type(double of_float, double of_double) {
  return A(sizeof(A) == 4 ? of_float : of_double);
}

// c0 + c1 x + c2 x^2 + ...
template <class A>
SENET_INLINE Group<A> polynomial(const Group<A>&, A c) {
  return splat(c);
}
template <class A, class... More>
SENET_INLINE Group<A> polynomial(const Group<A>& x, A c, More... more) {
  return fma(x, polynomial(x, more...), splat(c));
}

template <class F>
SENET_INLINE Group<double> per_lane(const Group<double>& g, const F& f) {
  double lane[kGroup];
  store(lane, g);
  for (int i = 0; i < kGroup; ++i) lane[i] = f(lane[i]);
  return load(lane);
}

// ------------------------------------------------------------------------------------------------ exp

// e^y as a fraction and a power of two: a product with it is rounded to a subnormal number only once, at the end.
template <class A>
struct Exp;
template <>
struct Exp<float> {
  Group<float> fraction, power;

  SENET_INLINE Group<float> times(const Group<float>& x) const {
    Group<float> out = x * fraction;
    for (int i = 0; i < Group<float>::kVecs; ++i) {
#if defined(__AVX512F__)
      out.v[i] = (Lanes<float>::Vec)_mm512_scalef_ps((__m512)out.v[i], (__m512)power.v[i]);
#else
      // In two steps, as 2^power may be none of float's.
      using L = Lanes<float>;
      const L::Int all = __builtin_convertvector(power.v[i], L::Int), half = all >> 1;
      out.v[i] = out.v[i] * (L::Vec)((half + 127) << 23) * (L::Vec)((all - half + 127) << 23);
#endif
    }
    return out;
  }
};
template <>
struct Exp<double> {
  Group<double> value;
  SENET_INLINE Group<double> times(const Group<double>& x) const { return x * value; }
};

// e^(y + low) for -125 <= y <= 40 and |low| < 0.07; NaN stays NaN. The argument is reduced by multiples of ln 2 in two
// parts, as in Cephes' expf (S. L. Moshier, 1989); the first part has few bits, so its products are exact. The
// polynomial is the minimax one of relative error 3e-9.
SENET_INLINE Exp<float> exponential(const Group<float>& y, const Group<float>& low) {
  const Group<float> shift = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Group<float> n = fma(y, splat(1.44269504f), shift) - shift;
  const Group<float> r = ((y - n * 0.693145752f) - n * 1.42860677e-6f) + low;
  return {polynomial(r, 1.0f, 1.0f, 0.4999999343f, 0.166665204f, 0.04166839032f, 0.008368744962f, 0.001381456888f), n};
}
SENET_INLINE Exp<float> exponential(const Group<float>& y) { return exponential(y, splat(0.0f)); }
SENET_INLINE Exp<double> exponential(const Group<double>& y) {
  return {per_lane(y, [](double v) { return ::exp(v); })};
}

// ------------------------------------------------------------------------------------------------ v * F(v)

// Of F, a cumulative distribution function symmetric about zero, at a = |v| up to a limit beyond which it is 0 or 1:
// F(-a) = e * tail and F(-a) - a F'(a) = e * slope.
template <class A>
struct Tail {
  Group<A> a;
  Exp<A> e;
  Group<A> tail, slope;
};

// v F(v) = max(v, 0) - a F(-a), whose derivatives at a and -a add up to 1. As torch, NaN from an infinity times zero.
template <class A>
SENET_INLINE void times_distribution(const Group<A>& v, const Tail<A>& t, Group<A>& value, Group<A>& slope) {
  const Group<A> zero = splat(A(0)), nothing = v * A(0);
  const Mask<A> negative = v < zero;
  value = where(negative, nothing, v) - t.e.times(t.a * t.tail);
  const Group<A> h = t.e.times(t.slope);
  slope = where(negative, h, A(1) - h) + nothing;
}

// F(w) = 1 / (1 + e^-w), with w an odd function of v: e = exp(-|w|), and dw / dv at a.
template <class A>
SENET_INLINE Tail<A> logistic_tail(const Group<A>& a, const Exp<A>& e, const Group<A>& dw) {
  const Group<A> r = A(1) / (A(1) + e.times(splat(A(1))));
  return {a, e, r, r * (A(1) - a * dw * r)};
}

// F normal. F(-a) = exp(-a^2 / 2) * m(a), with m a polynomial in t = 1 / (1 + 5/16 a), times t: the substitution of
// M. Shepherd and J. Laframboise, "Chebyshev approximation of (1 + 2x) exp(x^2) erfc x in 0 <= x < inf", Math. Comp. 36
// (1981). Minimax, of relative error 1.2e-8.
constexpr double kInvSqrt2Pi = 0.39894228040143267794, kSqrtHalf = 0.70710678118654752440;
SENET_INLINE Tail<float> normal_tail(const Group<float>& a) {
  // a^2 in two parts, of which the first is exact.
  Group<float> high;
  for (int i = 0; i < Group<float>::kVecs; ++i)
    high.v[i] = (Lanes<float>::Vec)((Lanes<float>::Bits)a.v[i] & 0xfffff000u);
  const Exp<float> e = exponential(high * high * -0.5f, (a - high) * (a + high) * -0.5f);
  const Group<float> t = 1.0f / (a * 0.3125f + 1.0f);
  const Group<float> m =
      t * polynomial(t * 2.0f - 1.0f, 0.229964961f, 0.166813844f, 0.0830752537f, 0.0231348863f, -0.000507397903f,
                     -0.00258326374f, -0.000223673134f, 0.00033917784f, 2.41318114e-5f, -3.79252003e-5f);
  return {a, e, m, m - a * float(kInvSqrt2Pi)};
}
SENET_INLINE Tail<double> normal_tail(const Group<double>& a) {
  const Group<double> m = per_lane(a, [](double v) { return 0.5 * ::erfc(v * kSqrtHalf); });
  const Exp<double> e = exponential(a * a * -0.5);
  return {a, {splat(1.0)}, m, m - e.times(a * kInvSqrt2Pi)};
}

// e^-w of gelu_tanh's w. For float in double: 2^-24 of a w of 100 would be 100 units in e^-w's last place.
constexpr double kGeluLinear = 2 * 0.79788456080286535588, kGeluCubic = kGeluLinear * 0.044715;
SENET_INLINE Exp<float> gelu_tanh_exponential(const Group<float>& a) {
  typedef double Wide __attribute__((vector_size(2 * kVectorBytes)));
  using Vec = Lanes<float>::Vec;
  Group<float> y, low;
  for (int i = 0; i < Group<float>::kVecs; ++i) {
    const Wide wide = __builtin_convertvector(a.v[i], Wide);
    const Wide exact = wide * (wide * wide * -kGeluCubic - kGeluLinear);
    y.v[i] = __builtin_convertvector(exact, Vec);
    low.v[i] = __builtin_convertvector(exact - __builtin_convertvector(y.v[i], Wide), Vec);
  }
  return exponential(y, low);
}
SENET_INLINE Exp<double> gelu_tanh_exponential(const Group<double>& a) {
  return exponential(a * (a * a * -kGeluCubic - kGeluLinear));
}

// ------------------------------------------------------------------------------------------------ the functions

// Called with v, each gives f(v) and f'(v); what a caller does not use is not computed. kFlat: f is constant somewhere,
// and there not even a NaN passes backward.
struct Smooth {
  static constexpr bool kFlat = false;
};
struct Flat {
  static constexpr bool kFlat = true;
};

struct Identity : Smooth {
  template <class A>
  SENET_INLINE void operator()(const Group<A>& v, Group<A>& value, Group<A>& slope) const {
    value = v;
    slope = splat(A(1));
  }
};

struct Relu : Flat {
  template <class A>
  SENET_INLINE void operator()(const Group<A>& v, Group<A>& value, Group<A>& slope) const {
    const Group<A> zero = splat(A(0));
    value = where(v < zero, zero, v);
    slope = where(v <= zero, zero, splat(A(1)));
  }
};

struct Relu6 : Flat {
  template <class A>
  SENET_INLINE void operator()(const Group<A>& v, Group<A>& value, Group<A>& slope) const {
    const Group<A> zero = splat(A(0)), six = splat(A(6));
    value = where(v < zero, zero, where(six < v, six, v));
    slope = where(v <= zero, zero, where(six <= v, zero, splat(A(1))));
  }
};

struct LeakyRelu : Smooth {
  double negative_slope;
  explicit LeakyRelu(double p0) : negative_slope(p0) {}
  template <class A>
  SENET_INLINE void operator()(const Group<A>& v, Group<A>& value, Group<A>& slope) const {
    slope = where(splat(A(0)) < v, splat(A(1)), splat(A(negative_slope)));
    value = v * slope;
  }
};

struct Silu : Smooth {
  template <class A>
  SENET_INLINE void operator()(const Group<A>& v, Group<A>& value, Group<A>& slope) const {
    const Group<A> one = splat(A(1)), a = min(abs(v), by_type<A>(120, 760));
    times_distribution(v, logistic_tail(a, exponential(a * A(-1)), one), value, slope);
  }
};

struct Gelu : Smooth {
  template <class A>
  SENET_INLINE void operator()(const Group<A>& v, Group<A>& value, Group<A>& slope) const {
    times_distribution(v, normal_tail(min(abs(v), by_type<A>(15.5, 39))), value, slope);
  }
};

struct GeluTanh : Smooth {
  template <class A>
  SENET_INLINE void operator()(const Group<A>& v, Group<A>& value, Group<A>& slope) const {
    const Group<A> a = min(abs(v), by_type<A>(11.25, 22));
    const Group<A> dw = a * a * A(3 * kGeluCubic) + A(kGeluLinear);
    times_distribution(v, logistic_tail(a, gelu_tanh_exponential(a), dw), value, slope);
  }
};

struct Hardswish : Flat {
  template <class A>
  SENET_INLINE void operator()(const Group<A>& v, Group<A>& value, Group<A>& slope) const {
    const Group<A> three = splat(A(3));
    const Mask<A> low = v <= splat(A(-3)), high = three <= v;
    value = where(low, v * A(0), where(high, v, v * ((v + three) * A(1.0 / 6))));
    slope = where(low, splat(A(0)), where(high, splat(A(1)), (v + A(1.5)) * A(1.0 / 3)));
  }
};

// With e = exp(v) and n = e (e + 2), tanh(log(1 + e)) is n / (n + 2); above 20 mish is the identity.
struct Mish : Smooth {
  template <class A>
  SENET_INLINE void operator()(const Group<A>& v, Group<A>& value, Group<A>& slope) const {
    const Group<A> lowest = splat(by_type<A>(-120, -760)), twenty = splat(A(20)), nothing = v * A(0);
    const Mask<A> large = twenty < v;
    const Group<A> u = where(v < lowest, lowest, where(large, twenty, v));
    const Exp<A> exp_u = exponential(u);
    const Group<A> e = exp_u.times(splat(A(1)));
    const Group<A> e2 = e + A(2), n2 = e * e2 + A(2), r = A(1) / n2;
    value = where(large, v, exp_u.times(u * (e2 * r)) + nothing);
    slope = where(large, splat(A(1)), exp_u.times((e2 * n2 + A(4) * u * (e + A(1))) * r * r)) + nothing;
  }
};

// 1 - 2 / (e^2a + 1), below 0.625 a polynomial (minimax, 4e-9), as in Cephes' tanhf (S. L. Moshier, 1989).
struct Tanh : Smooth {
  SENET_INLINE static Group<float> value_of(const Group<float>& v, const Group<float>& a, const Group<float>& er) {
    const Group<float> square = a * a;
    const Group<float> near =
        a +
        a * square * polynomial(square, -0.333332839f, 0.133314913f, -0.0537434997f, 0.0206505916f, -0.00571704792f);
    return copysign(where(a < splat(0.625f), near, 1.0f - er * 2.0f), v);
  }
  SENET_INLINE static Group<double> value_of(const Group<double>& v, const Group<double>&, const Group<double>&) {
    return per_lane(v, [](double u) { return ::tanh(u); });
  }
  template <class A>
  SENET_INLINE void operator()(const Group<A>& v, Group<A>& value, Group<A>& slope) const {
    const Group<A> one = splat(A(1)), a = min(abs(v), by_type<A>(60, 380));
    const Exp<A> exp_a = exponential(a * A(-2));
    const Group<A> e = exp_a.times(one), r = one / (one + e);
    value = value_of(v, a, e * r);
    slope = exp_a.times(r * r * A(4));
  }
};

struct Sigmoid : Smooth {
  SENET_INLINE static Group<float> value_of(const Group<float>& v, const Group<float>& e) {
    return where(v < splat(0.0f), e, splat(1.0f)) / (e + 1.0f);
  }
  SENET_INLINE static Group<double> value_of(const Group<double>& v, const Group<double>&) {
    return 1.0 / (exponential(v * -1.0).value + 1.0);  // bit by bit torch's
  }
  template <class A>
  SENET_INLINE void operator()(const Group<A>& v, Group<A>& value, Group<A>& slope) const {
    const Group<A> one = splat(A(1));
    const Exp<A> exp_a = exponential(min(abs(v), by_type<A>(120, 760)) * A(-1));
    const Group<A> e = exp_a.times(one), sum = e + A(1);
    value = value_of(v, e);
    slope = exp_a.times(one / (sum * sum));
  }
};

struct Hardsigmoid : Flat {
  double p0, p1;
  Hardsigmoid(double slope, double offset) : p0(slope), p1(offset) {}
  template <class A>
  SENET_INLINE void operator()(const Group<A>& v, Group<A>& value, Group<A>& slope) const {
    const Group<A> zero = splat(A(0)), one = splat(A(1)), product = v * A(p0);
    // A sum in one rounding with its product may be off zero at a corner: 3 * (1 / 6.0) is 0.5 only when rounded.
    value = where(product <= splat(A(-p1)), zero, where(splat(A(1 - p1)) <= product, one, product + A(p1)));
    slope = where(zero < value, where(value < one, splat(A(p0)), zero), zero);
  }
};

// visit(function), so that a loop in `visit` is compiled once for each function.
template <class Visitor>
SENET_INLINE void dispatch(Function f, double p0, double p1, const Visitor& visit) {
  switch (f) {
    case Function::identity:
      return visit(Identity{});
    case Function::relu:
      return visit(Relu{});
    case Function::relu6:
      return visit(Relu6{});
    case Function::leaky_relu:
      return visit(LeakyRelu(p0));
    case Function::silu:
      return visit(Silu{});
    case Function::gelu:
      return visit(Gelu{});
    case Function::gelu_tanh:
      return visit(GeluTanh{});
    case Function::hardswish:
      return visit(Hardswish{});
    case Function::mish:
      return visit(Mish{});
    case Function::tanh:
      return visit(Tanh{});
    case Function::sigmoid:
      return visit(Sigmoid{});
    case Function::hardsigmoid:
      return visit(Hardsigmoid(p0, p1));
  }
}

// ------------------------------------------------------------------------------------------------ arrays

// value = f(u); value may be u.
template <class A>
void function_values(Function f, double p0, double p1, const A* u, A* value, int64_t count) {
  dispatch(f, p0, p1, [=](const auto& function) {
    for (int64_t i = 0; i < count; i += kGroup) {
      const int part = count - i < kGroup ? int(count - i) : kGroup;
      Group<A> y, slope;
      function(load_upto(u + i, part), y, slope);
      store_upto(value + i, y, part);
    }
  });
}

// value = f(u) and slope = f'(u); value may be u.
template <class A>
void function_values_and_slopes(Function f, double p0, double p1, const A* u, A* value, A* slope, int64_t count) {
  dispatch(f, p0, p1, [=](const auto& function) {
    for (int64_t i = 0; i < count; i += kGroup) {
      const int part = count - i < kGroup ? int(count - i) : kGroup;
      Group<A> y, dy;
      function(load_upto(u + i, part), y, dy);
      store_upto(value + i, y, part);
      store_upto(slope + i, dy, part);
    }
  });
}

// out = d * f'(v); as torch, where the function is flat not even NaN passes. out may be d.
template <class A>
void function_backward(Function f, double p0, double p1, const A* v, const A* d, A* out, int64_t count) {
  dispatch(f, p0, p1, [=](const auto& function) {
    for (int64_t i = 0; i < count; i += kGroup) {
      const int part = count - i < kGroup ? int(count - i) : kGroup;
      Group<A> y, slope;
      function(load_upto(v + i, part), y, slope);
      Group<A> gradient = load_upto(d + i, part) * slope;
      if (function.kFlat) gradient = where_equal(slope, splat(A(0)), slope, gradient);
      store_upto(out + i, gradient, part);
    }
  });
}

template <class A>
void function_backward_from_output(Function f, double p0, double, const A* value, const A* d, A* out, int64_t count) {
  switch (f) {
    case Function::sigmoid:
      for (int64_t i = 0; i < count; ++i) out[i] = d[i] * (value[i] * (1 - value[i]));
      return;
    case Function::tanh:
      for (int64_t i = 0; i < count; ++i) out[i] = d[i] * (1 - value[i] * value[i]);
      return;
    case Function::hardsigmoid:
      for (int64_t i = 0; i < count; ++i) out[i] = value[i] > 0 && value[i] < 1 ? d[i] * A(p0) : A(0);
      return;
    case Function::relu:
      for (int64_t i = 0; i < count; ++i) out[i] = value[i] <= 0 ? A(0) : d[i];
      return;
    default:  // identity; the host file lets no other gate in
      for (int64_t i = 0; i < count; ++i) out[i] = d[i];
  }
}

}  // namespace SENET_ISA
}  // namespace senet
