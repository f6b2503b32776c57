// Entry points of info_nce on the CPU: the arithmetic that the build and the inputs ask for.
#pragma once
#include "info_nce_bwd.h"
#include "info_nce_fwd.h"

namespace limber {

#if defined(LIMBER_ISA_AMX)
// Whether towers other than bf16 may be split into bf16 parts. Small products are faster as they are. A part of an
// infinity is NaN, parts below 2^-126 count as zero: in towers, and in gradients, whose largest value is ordinary that
// costs no digit.
inline float largest(const Rows& rows, int threads) {
  float most = 0.f, nan = 0.f;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(max : most) reduction(+ : nan)
  for (int64_t i = 0; i < rows.count; i++) {
    simd::vec m = simd::zero(), n = m;
    const void* row = rows.row(i);
    for (int64_t d = 0; d < rows.D; d += simd::W) {
      const simd::vec v = load_as_float(rows.dtype, row, d, rows.D - d);
      m = simd::max(simd::abs(v), m), n = simd::fma(v, simd::zero(), n);
    }
    most = std::max(most, simd::hmax(m)), nan += simd::sum(n);
  }
  return most + nan;
}
inline bool ordinary(float largest) { return largest > 1e-15f && largest < 1e15f; }
inline bool split_towers(const InfoNceParams& p) {
  return p.dtype != Dtype::bf16 && p.D >= 16 && std::min(p.N, p.M) >= 32 &&
         ordinary(largest(image_rows(p, nullptr), p.threads)) && ordinary(largest(text_rows(p, nullptr), p.threads));
}
inline bool split_gradients(const InfoNceParams& p) {
  auto all = [&](const float* grad, int64_t n) {
    float most = 0.f, nan = 0.f;
    for (int64_t i = 0; i < n; i++) most = std::max(most, std::fabs(grad[i])), nan += 0 * grad[i];
    return ordinary((most + nan) * (float)std::fabs(p.scale));
  };
  return all(p.row_grad, p.N) && (!p.columns || all(p.col_grad, p.M));
}
#endif

inline void info_nce_fwd(const InfoNceParams& p) {
  const auto run = [&](auto op) { InfoNceForward<decltype(op)>(p).run(); };
#if defined(LIMBER_ISA_AMX)
  if (split_towers(p)) return with_split(p.dtype, run);
#endif
  with_arithmetic(p.dtype, run);
}
inline void info_nce_bwd(InfoNceParams p) {
  const auto run = [&](auto op) { InfoNceBackward<decltype(op)>(p).run(); };
#if defined(LIMBER_ISA_AMX)
  if (split_towers(p)) {
    if (split_gradients(p)) return with_split(p.dtype, run);
    p.cache = nullptr;  // its tiles were laid out for the other arithmetic
  }
#endif
  with_arithmetic(p.dtype, run);
}

}  // namespace limber
