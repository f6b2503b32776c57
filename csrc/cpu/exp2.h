// Elementary functions on vectors, in base 2: x = n + f with an integer n and |f| <= 1/2, 2^x = 2^f 2^n.
#pragma once
#include "simd.h"

namespace limber {

constexpr double LN2 = 0.693147180559945309, LOG2E = 1.44269504088896341;

// 2^f for |f| <= 1/2, minimax in relative error with p(0) = 1: degree 4 2.8e-6, degree 6 2.0e-9.
template <int DEGREE>
static inline simd::vec exp2_fraction(simd::vec f) {
  static_assert(DEGREE == 4 || DEGREE == 6, "no coefficients");
  constexpr float c4[] = {9.582836405e-03f, 5.590641343e-02f, 2.402409882e-01f, 6.931241948e-01f, 1.f};
  constexpr float c6[] = {
      1.535334975e-04f, 1.339887442e-03f, 9.618437394e-03f, 5.550332471e-02f, 2.402264791e-01f, 6.931472029e-01f, 1.f};
  const float* c = DEGREE == 4 ? c4 : c6;
  simd::vec p = simd::set1(c[0]);
#pragma GCC unroll 8
  for (int i = 1; i <= DEGREE; i++) p = simd::fma(p, f, simd::set1(c[i]));
  return p;
}

template <int DEGREE>
static inline simd::vec exp2_sum(simd::vec f, simd::vec n) {  // 2^(f + n) for an integer n and any f
  simd::vec k = simd::round(f);
  return simd::ldexp(exp2_fraction<DEGREE>(simd::sub(f, k)), simd::add(n, k));
}

static inline simd::vec exp_nonpositive(simd::vec x) {  // e^x for x <= 0, to fp32 rounding; 0 from -150 on, -inf too
  x = simd::max(simd::set1(-150.f), x);                 // in this order NaN stays
  simd::vec n = simd::round(simd::mul(x, simd::set1((float)LOG2E)));
  simd::vec f = simd::fms(x, simd::set1((float)LOG2E), n);
  return simd::ldexp(exp2_fraction<6>(simd::fma(x, simd::set1((float)(LOG2E - (float)LOG2E)), f)), n);
}

// log(1 + e) for 0 <= e <= 1 with full relative precision: 2 atanh(z), z = e / (2 + e) <= 1/3; 5e-9
static inline simd::vec log1p_unit(simd::vec e) {
  simd::vec z = simd::div(e, simd::add(e, simd::set1(2.f))), u = simd::mul(z, z);
  simd::vec q = simd::set1(2.805277705e-01f);
  q = simd::fma(q, u, simd::set1(2.799416123e-01f));
  q = simd::fma(q, u, simd::set1(4.002195075e-01f));
  q = simd::fma(q, u, simd::set1(6.666640980e-01f));
  q = simd::fma(q, u, simd::set1(2.f));
  return simd::mul(z, q);
}

}  // namespace limber
