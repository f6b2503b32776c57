// gelu_new, z / 2 (1 + tanh(u)) with u = sqrt(2 / pi) (z + 0.044715 z^3), as z sigmoid(2 u); and its derivative.
#pragma once
#include "exp2.h"

namespace limber {

struct GeluNew {
  // 2^-t = e^(-2 u), t = z (LINEAR + CUBIC z^2)
  static constexpr float LINEAR = (float)(2 * 0.797884560802865356 * LOG2E), CUBIC = LINEAR * 0.044715f;

  static simd::vec value(simd::vec z) {
    return simd::div(z, simd::add(simd::set1(1.f), inverse_odds<150>(z, simd::mul(z, z))));
  }
  // s (1 + z (1 - s) 2 u'), s = sigmoid(2 u): 0 or 1 from |z| = 20 on, whose square stays finite
  static simd::vec slope(simd::vec z) {
    z = simd::min(simd::set1(20.f), simd::max(simd::set1(-20.f), z));  // in this order NaN stays
    const simd::vec square = simd::mul(z, z), e = inverse_odds<100>(z, square), one = simd::set1(1.f);
    const simd::vec s = simd::div(one, simd::add(one, e)), rest = simd::mul(e, s);  // 1 - s without cancellation
    const simd::vec inner = simd::fma(square, simd::set1((float)(3 * LN2) * CUBIC), simd::set1((float)LN2 * LINEAR));
    return simd::mul(s, simd::fma(simd::mul(z, rest), inner, one));
  }

 private:
  // e^(-2 u) between 2^-126, below which numbers are denormal and slow, and 2^MOST, infinite from 128 on
  template <int MOST>
  static simd::vec inverse_odds(simd::vec z, simd::vec square) {
    simd::vec t = simd::mul(z, simd::fma(square, simd::set1(-CUBIC), simd::set1(-LINEAR)));
    t = simd::min(simd::set1((float)MOST), simd::max(simd::set1(-126.f), t));
    const simd::vec n = simd::round(t);
    return simd::ldexp(exp2_fraction<6>(simd::sub(t, n)), n);
  }
};

}  // namespace limber
