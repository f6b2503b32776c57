// Backward of project_concat. The incoming gradient's rows are read where they lie, masked again as they are packed:
//   d_weight = factor (mask G)^T X,  d_bias = factor sum_r mask G,  d_features = factor (mask G) W
// Under LayerNorm the projection is computed again and its gradient takes its place, in one buffer of the features'
// dtype. A block of d_weight and a block of columns of d_features has one owner, which sums in a fixed order: bit-equal
// for any number of threads. FLOP: 2 rows D E for each of d_weight and d_features.
#pragma once
#include "project_concat_fwd.h"

namespace limber {

template <class Op>
class ProjectConcatBackward {
  using B = ProjectBlocks<Op>;
  static constexpr int MR = Op::MR, W = simd::W, P = Op::P, PARTS = Op::PARTS;
  static constexpr int TALL = B::TALL, LDE = 192 + 16, LDC = B::LDC;
  static constexpr int KS = Op::TILES ? MR : LDE;       // k stride of a packed block of gradient columns
  static constexpr int CHAIN = 32;                      // rows that a bias' gradient adds up before they join the total
  static constexpr int64_t PACKED_ROWS = 64;            // of the weight, in one go
  static constexpr int64_t PANELS = int64_t(32) << 20;  // bytes of packed gradient rows in front of d_features

 public:
  explicit ProjectConcatBackward(const ProjectConcatParams& params)
      : p(params),
        rows_(prompt_rows(p)),
        Kr_(dwords<Op>(rows_)),
        mask_(p.seed, p.threshold),
        offset_(rows_),
        factor_(p.dropout ? p.factor : 1.f) {
    for (int64_t r = 0; r < rows_; r++)
      offset_[r] = p.positions[r] / p.S * p.grad_batch_stride + p.positions[r] % p.S * p.grad_token_stride;
    gradient_ = {p.grad, offset_, rows_, p.E, p.dtype, p.dropout ? &mask_ : nullptr};
  }

  // False: an infinity was among the inputs (see Finite), and the gradients are not to be used.
  bool run() {
    if (!rows_) return clear(), true;
    if (p.d_weight) advise_huge_pages(p.d_weight, p.E * p.D * size_of(p.dtype));
    if (p.d_features) advise_huge_pages(p.d_features, rows_ * p.D * size_of(p.dtype));
    if (p.layer_norm) through_layer_norm();
    if (p.d_weight || p.d_bias) weight_gradient();
    if (p.d_features) feature_gradient();
    return finite_;
  }

 private:
  void clear() const {
    if (p.d_weight) std::memset(p.d_weight, 0, p.E * p.D * size_of(p.dtype));
    if (p.d_bias) std::memset(p.d_bias, 0, p.E * size_of(p.dtype));
    for (float* d : {p.d_ln_weight, p.d_ln_bias})
      if (d) std::memset(d, 0, p.E * sizeof(float));
  }

  // z = dropout(projection), u = (z - mean) rstd: dz = rstd (g w - mean(g w) - u mean(g w u)), times mask and factor.
  void through_layer_norm() {
    between_ = Buffer<char>(rows_ * p.E * size_of(p.dtype));
    Buffer<int64_t> offset(rows_);
    for (int64_t r = 0; r < rows_; r++) offset[r] = r * p.E;
    struct Moments {
      float mean, rstd, gradient, along;
    };
    Buffer<Moments> moments(rows_);
    const PlacedRows g{p.grad, offset_, rows_, p.E, p.dtype}, z{between_, offset, rows_, p.E, p.dtype};
    auto scaled = [&](int64_t r, int64_t e) {
      const simd::vec x = load_as_float(p.dtype, g.row(r), e, p.E - e);
      return p.ln_weight ? simd::mul(x, simd::load_first(p.ln_weight + e, p.E - e)) : x;
    };
    Projection<Op> projection(p, between_, nullptr);
#pragma omp parallel num_threads(p.threads)
    {
      projection.run();
      // Where it is not finite a gradient that depends on it is not either.
#pragma omp for schedule(static)
      for (int64_t r = 0; r < rows_; r++) {
        const RowMoments m(p.dtype, z.row(r), p.E, p.ln_eps);
        simd::vec sum = simd::zero(), along = simd::zero();
        for (int64_t e = 0; e < p.E; e += W) {
          const simd::vec x = scaled(r, e);
          sum = simd::add(sum, x);
          along = simd::fma(x, unit(z, r, e, m.mean, m.rstd), along);
        }
        moments[r] = {m.mean, m.rstd, simd::sum(sum) / (float)p.E, simd::sum(along) / (float)p.E};
      }
#pragma omp for schedule(dynamic, 8)
      for (int64_t e = 0; e < p.E; e += NR) {
        alignas(64) float keep[NR];
        const int width = (int)ceil_div(std::min<int64_t>(NR, p.E - e), W);
        simd::vec d_weight[2] = {simd::zero(), simd::zero()}, d_bias[2] = {simd::zero(), simd::zero()};
        for (int64_t r0 = 0; r0 < rows_; r0 += CHAIN) {
          simd::vec weight[2] = {simd::zero(), simd::zero()}, bias[2] = {simd::zero(), simd::zero()};
          for (int64_t r = r0; r < std::min(r0 + CHAIN, rows_); r++) {
            const Moments& m = moments[r];
            if (p.dropout) mask_.factors<NR>(mask_.key(r), e, p.factor, keep);
            for (int h = 0; h < width; h++) {
              const int64_t at = e + h * W, left = p.E - at;
              const simd::vec u = unit(z, r, at, m.mean, m.rstd), x = load_as_float(p.dtype, g.row(r), at, left);
              weight[h] = simd::fma(x, u, weight[h]);
              bias[h] = simd::add(bias[h], x);
              simd::vec dz = simd::sub(scaled(r, at), simd::set1(m.gradient));
              dz = simd::mul(simd::set1(m.rstd), simd::sub(dz, simd::mul(u, simd::set1(m.along))));
              if (p.dropout) dz = simd::mul(dz, simd::load(keep + h * W));
              store_from_float(p.dtype, const_cast<void*>(z.row(r)), at, dz, left);
            }
          }
          for (int h = 0; h < width; h++) {
            d_weight[h] = simd::add(d_weight[h], weight[h]);
            d_bias[h] = simd::add(d_bias[h], bias[h]);
          }
        }
        for (int h = 0; h < width; h++) {
          const int64_t at = e + h * W;
          if (p.d_ln_weight) simd::store_first(p.d_ln_weight + at, d_weight[h], p.E - at);
          if (p.d_ln_bias) simd::store_first(p.d_ln_bias + at, d_bias[h], p.E - at);
        }
      }
    }
    offset_ = std::move(offset);
    gradient_ = {between_, offset_, rows_, p.E, p.dtype};
    factor_ = 1.f;
  }
  // Lanes past E are junk times a zero.
  simd::vec unit(const PlacedRows& z, int64_t r, int64_t e, float mean, float rstd) const {
    const simd::vec x = load_as_float(p.dtype, z.row(r), e, p.E - e);
    return simd::mul(simd::sub(x, simd::set1(mean)), simd::set1(rstd));
  }

  void weight_gradient() {
    const int64_t tall = std::min<int64_t>(TALL, round_up(ceil_div(p.E, 2 * p.threads), MR));
    const int64_t wide = std::min<int64_t>(B::COLUMNS, round_up(p.D, NR)), Dp = round_up(p.D, NR);
    // Equal parts, in whole chains of products, so that sums do not depend on how a strip is cut.
    const int64_t part = round_up(ceil_div(Kr_, ceil_div(Kr_, dwords<Op>(B::K_ROWS))), B::PART);
    const int64_t gradient = Kr_ * (Op::TILES ? round_up(tall, MR) : LDE), sums = round_up(tall + NR, NR);
    const int64_t per_thread = gradient + sums + round_up(tall, MR) * LDC;
    const Buffer<int64_t> offset = feature_offsets(p);
    const PlacedRows features{p.features, offset, rows_, p.D, p.dtype};
    Buffer<float> packed(p.d_weight ? Dp * Kr_ : 0), scratch = scratch_floats(p.threads * per_thread);
#pragma omp parallel num_threads(p.threads)
    {
      [[maybe_unused]] const typename Op::Session session;
      float *a = scratch + omp_get_thread_num() * per_thread, *total = a + gradient, *c = total + sums;
      // The features' rows part by part, each [columns / NR][k][NR].
#pragma omp for schedule(dynamic, 1)
      for (int64_t r = 0; r < (p.d_weight ? rows_ : 0); r += PACKED_ROWS) {
        const int64_t at = dwords<Op>(r), k = at / part * part, kb = std::min(part, Kr_ - k);
        for (int64_t d = 0; d < Dp; d += NR)
          pack_natural<Op>(features, r, std::min(r + PACKED_ROWS, rows_), d, packed + k * Dp + d * kb + (at - k) * NR);
      }
#pragma omp for schedule(dynamic, 1)
      for (int64_t e = 0; e < p.E; e += tall) {
        const int64_t n = std::min(tall, p.E - e);
        pack_gradient(e, n, a, total);
        for (int64_t j = 0; p.d_bias && j < n; j += W)
          store_from_float(p.dtype, p.d_bias, e + j, simd::mul(simd::load(total + j), simd::set1(factor_)), n - j);
        for (int64_t d = 0; d < (p.d_weight ? p.D : 0); d += wide) {
          const int64_t nd = std::min(wide, p.D - d), nb = round_up(nd, NR);
          for (int64_t k = 0; k < Kr_; k += part)
            for (int64_t j = 0; j < nb; j += NR)
              multiply_panel(c + j, n, std::min(part, Kr_ - k), a + k * KS,
                             packed + k * Dp + (d + j) * std::min(part, Kr_ - k), k > 0);
          for (int64_t i = 0; i < n; i++)
            write(p.d_weight, e + i, d, nd, c + i * LDC, p.E * p.D * size_of(p.dtype) >= LARGE);
        }
      }
      end_stores();
    }
  }

  // C[n x NR] (+)= A B over k dwords: B, a packed panel, streams from L3, A, the packed gradient, lies in L2.
  void multiply_panel(float* C, int64_t n, int64_t k, const float* A, const float* Bp, bool accumulate) const {
    const int64_t tiles = ceil_div(n, MR), share = ceil_div(4 * B::PART * NR, tiles);
    for (int64_t at = 0; at < k; at += B::PART)
      for (int64_t i = 0; i < tiles; i++) {
        stream_ahead(Bp + (at + B::PART) * NR + i * share / 4, share);
        gemm_tile<Op, 1, KS>(Op::TILES ? MR : (int)std::min<int64_t>(MR, n - i * MR),
                             std::min<int64_t>(B::PART, k - at), A + i * (Op::TILES ? MR * Kr_ : MR) + at * KS,
                             Bp + at * NR, C + i * MR * LDC, LDC, NR, accumulate || at > 0);
      }
  }

  // Columns e .. e+n-1 of all gradient rows as the A of d_weight, whose k is the row, and their sums.
  void pack_gradient(int64_t e, int64_t n, float* a, float* total) const {
    constexpr int STEP_ROWS = CHAIN, COLUMNS = P * W;
    for (int64_t j = 0; j < round_up(n, NR); j += W) simd::store(total + j, simd::zero());
    for (int64_t r0 = 0; r0 < Kr_ / PARTS * P; r0 += STEP_ROWS)
      for (int64_t j = 0; j < n; j += COLUMNS) {
        simd::vec sum[2] = {simd::zero(), simd::zero()};
        auto load = [&](int64_t r) {
          if (r >= rows_) return Dwords<Op>{};
          simd::vec v[P];
          gradient_.template floats<Op>(r, e + j, v);
          for (int h = 0; h < P; h++) sum[h] = simd::add(sum[h], v[h]);
          return to_dwords<Op>(v);
        };
        if constexpr (P == 1) {
          for (int64_t r = r0; r < std::min(r0 + STEP_ROWS, rows_); r++) simd::store(a + r * LDE + j, load(r).part[0]);
        }
#if defined(LIMBER_BF16_PAIRS)
        if constexpr (P == 2) {
          simd::vec lo[PARTS][W], hi[PARTS][W];
          for (int i = 0; i < W; i++) {
            const auto even = load(r0 + 2 * i), odd = load(r0 + 2 * i + 1);
            for (int q = 0; q < PARTS; q++) simd::zip_rows(even.part[q], odd.part[q], lo[q][i], hi[q][i]);
          }
          if constexpr (Op::TILES) {
            float* out = a + j * Kr_ + dwords<Op>(r0) * MR;
            for (int q = 0; q < PARTS; q++, out += MR / 2 * W) {
              simd::transpose(lo[q]), simd::transpose(hi[q]);
              for (int i = 0; i < W; i++, out += W) simd::store(out, lo[q][i]), simd::store(out + MR / 2 * W, hi[q][i]);
            }
          } else {
            for (int i = 0; i < W && r0 / P + i < Kr_; i++) {
              simd::store(a + (r0 / P + i) * LDE + j, lo[0][i]);
              simd::store(a + (r0 / P + i) * LDE + j + W, hi[0][i]);
            }
          }
        }
#endif
        for (int h = 0; h < P; h++) simd::store(total + j + h * W, simd::add(simd::load(total + j + h * W), sum[h]));
      }
  }

  void feature_gradient() {
    const int64_t Ke = dwords<Op>(p.E), width = B::columns(p.D, Ke, p.threads);
    const int64_t most = std::clamp<int64_t>(round_up(PANELS / (4 * Ke), MR), MR, round_up(rows_, MR));
    const int64_t per_thread = width * Ke + MR * LDC;
    Buffer<float> packed(most * Ke), scratch = scratch_floats(p.threads * per_thread);
#pragma omp parallel num_threads(p.threads)
    {
      [[maybe_unused]] const typename Op::Session session;
      float *block = scratch + omp_get_thread_num() * per_thread, *strip = block + width * Ke;
      for (int64_t r0 = 0; r0 < rows_; r0 += most) {
        const int64_t r1 = std::min(r0 + most, rows_);
#pragma omp for schedule(dynamic, 1)
        for (int64_t r = r0; r < r1; r += MR)
          pack_rows<Op>(gradient_, r, std::min<int64_t>(r + MR, r1), packed + (r - r0) * Ke);
#pragma omp for schedule(dynamic, 1)
        for (int64_t d = 0; d < p.D; d += width) {
          const int64_t n = std::min(width, p.D - d), nb = round_up(n, NR);
          for (int64_t e = 0; e < p.E; e += PACKED_ROWS)
            for (int64_t j = 0; j < n; j += NR)
              pack_natural<Op>(weight_rows(p), e, std::min(e + PACKED_ROWS, p.E), d + j,
                               block + j * Ke + dwords<Op>(e) * NR);
          for (int64_t r = r0; r < r1; r += MR) {
            const int R = (int)std::min<int64_t>(MR, r1 - r);
            multiply_strip<Op>(strip, LDC, Op::TILES ? MR : R, Ke, packed + (r - r0) * Ke, block, NR * Ke, nb);
            for (int i = 0; i < R; i++) write(p.d_features, r + i, d, n, strip + i * LDC, false);
          }
        }
      }
    }
  }

  // Columns d .. d+n-1 of a gradient's row, from their sums.
  void write(void* out, int64_t row, int64_t d, int64_t n, const float* sums, bool past_caches) {
    finite_.see(sums, n);
    void* to = (char*)out + row * p.D * size_of(p.dtype);
    const simd::vec factor = simd::set1(factor_);
    for (int64_t j = 0; j < n; j += NR)
      store_two(p.dtype, to, d + j, simd::mul(simd::load(sums + j), factor),
                simd::mul(simd::load(sums + j + W), factor), n - j, past_caches);
  }
  static constexpr int64_t LARGE = int64_t(4) << 20;  // bytes of an output that leaves L2 before anyone reads it

  const ProjectConcatParams& p;
  const int64_t rows_, Kr_;
  const Dropout mask_;
  Buffer<int64_t> offset_;
  float factor_;
  PlacedRows gradient_{};
  Buffer<char> between_;
  Finite<Op> finite_;
};

}  // namespace limber
