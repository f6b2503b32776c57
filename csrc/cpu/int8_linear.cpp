// Entry points of int8_linear on the CPU: y = activation(x W^T + bias) + residual and dx = dy W, W = scales * integers.
#include "int8_linear_bwd.h"
#include "int8_linear_fwd.h"

namespace limber {

void int8_linear_fwd(const Int8LinearParams& p) {
  if (!p.M) return;
  for (void* to : {p.out, p.preactivation})
    if (to) advise_huge_pages(to, p.M * p.N * size_of(p.dtype));
  Int8Rows rows(p.M, p.K, p.eight_bits ? 1 : 2, p.threads);
  const Int8LinearForward forward(p, rows);
  const auto quantise = [&] {
    rows.quantise(
        [&](int64_t m, float* to) {
          const char* x = (const char*)p.x + m * p.x_stride * size_of(p.dtype);
          for (int64_t k = 0; k < p.K; k += simd::W) simd::store(to + k, load_as_float(p.dtype, x, k, p.K - k));
        },
        p.eight_bits ? p.outlier_threshold : 0);
  };
  if (p.M == 1) quantise();  // 2 us of one thread; barriers would cost more
#pragma omp parallel num_threads(p.threads)
  {
    [[maybe_unused]] const auto session = tile_session(rows);
    if (p.M > 1) quantise();
    forward.run();
  }
}

void int8_linear_bwd(const Int8LinearParams& p) {
  if (!p.M) return;
  advise_huge_pages(p.d_x, p.M * p.K * size_of(p.dtype));
  Int8Rows rows(p.M, p.N, 2, p.threads, Int8LinearBackward::CHUNK);
  const Int8LinearBackward backward(p, rows);
#pragma omp parallel num_threads(p.threads)
  {
    [[maybe_unused]] const auto session = tile_session(rows);
    rows.quantise(
        [&](int64_t m, float* to) {
          const char* grad = (const char*)p.grad + m * p.grad_stride * size_of(p.dtype);
          const char* z = (const char*)p.preactivation + m * p.N * size_of(p.dtype);
          for (int64_t n = 0; n < p.N; n += simd::W) {
            const int64_t left = p.N - n;
            simd::vec g = simd::mul(load_as_float(p.dtype, grad, n, left), simd::load_first(p.scales + n, left));
            if (p.preactivation) g = simd::mul(g, GeluNew::slope(load_as_float(p.dtype, z, n, left)));
            simd::store(to + n, g);
          }
        },
        0);
    backward.run();
  }
}

}  // namespace limber
