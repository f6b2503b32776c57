// Entry points of info_nce on the CPU: the arithmetic that the build and the inputs ask for.
#include "info_nce_bwd.h"
#include "info_nce_fwd.h"

namespace limber {

#if defined(LIMBER_ISA_AMX)
// Whether towers other than bf16 may be split into bf16 parts. Small products are faster as they are. A part of an
// infinity is NaN, parts below 2^-126 count as zero: in towers, and in gradients, whose largest value is ordinary that
// costs no digit.
inline bool ordinary(float largest) { return largest > 1e-15f && largest < 1e15f; }
inline float largest(const Rows& rows, int64_t i) {
  simd::vec m = simd::zero(), n = m;
  const void* row = rows.row(i);
  for (int64_t d = 0; d < rows.D; d += simd::W) {
    const simd::vec v = load_as_float(rows.dtype, row, d, rows.D - d);
    m = simd::max(simd::abs(v), m), n = simd::fma(v, simd::zero(), n);
  }
  return simd::hmax(m) + simd::sum(n);
}
inline bool split_towers(const InfoNceParams& p) {
  if (p.dtype == Dtype::bf16 || p.D < 16 || std::min(p.N, p.M) < 32) return false;
  const Rows images = image_rows(p, nullptr), texts = text_rows(p, nullptr);
  float image = 0.f, text = 0.f, nan = 0.f;
#pragma omp parallel num_threads(p.threads)
  {
#pragma omp for schedule(static) reduction(max : image) reduction(+ : nan) nowait
    for (int64_t i = 0; i < images.count; i++) {
      const float m = largest(images, i);
      image = std::max(image, m), nan += 0 * m;
    }
#pragma omp for schedule(static) reduction(max : text) reduction(+ : nan)
    for (int64_t i = 0; i < texts.count; i++) {
      const float m = largest(texts, i);
      text = std::max(text, m), nan += 0 * m;
    }
  }
  return nan == 0.f && ordinary(image) && ordinary(text);
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

void info_nce_fwd(const InfoNceParams& p) {
  const auto run = [&](auto op) { InfoNceForward<decltype(op)>(p).run(); };
#if defined(LIMBER_ISA_AMX)
  const bool split = split_towers(p);
  if (int32_t* kept = CacheMemory(p).split) *kept = split;
  if (split) return with_split(p.dtype, run);
#endif
  with_arithmetic(p.dtype, run);
}
void info_nce_bwd(const InfoNceParams& params) {
  InfoNceParams p = params;
  const auto run = [&](auto op) { InfoNceBackward<decltype(op)>(p).run(); };
#if defined(LIMBER_ISA_AMX)
  const int32_t* kept = CacheMemory(p).split;
  if (kept ? *kept : split_towers(p)) {
    if (split_gradients(p)) return with_split(p.dtype, run);
    p.cache = nullptr;  // its tiles were laid out for the other arithmetic
  }
#endif
  with_arithmetic(p.dtype, run);
}

}  // namespace limber
