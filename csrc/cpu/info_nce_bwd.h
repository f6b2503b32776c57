// Backward of info_nce: one recompute pass gives the gradients of both towers.
//
//   dS_ij = a_i P_ij + b_j Q_ij - [positive] (a_i + b_j) (1 - eps) - eps (a_i / C_i + b_j / C'_j),   d_image = scale dS
//   T,  d_text = scale dS^T I
// with P, Q the row and column softmax and a, b the gradients of the row and column losses. Per block of MB x NB:
// strips of x (recomputed, or E from the cache) become dS, then d_image += dS T and d_text += dS^T I. Every
// strip, d_image strip and d_text panel has one owner and a fixed order of accumulation (d_image over column blocks,
// d_text over row blocks): bit-equal for any number of threads. FLOP: 6 N (M + K) D.
#pragma once
#include <omp.h>

#include <optional>

#include "info_nce_common.h"

namespace limber {

constexpr int64_t GRADIENT_BUDGET = int64_t(128)
                                    << 20;  // what 16-bit gradients may hold of d_image's fp32 sums across super-blocks

template <class Op>
class InfoNceBackward {
  using B = Blocks<Op>;
  static constexpr int NB = B::NB, MB = B::MB, LDS = B::LDS, LDN = B::LDN, LDP = B::LDP, P = Op::P, MR = Op::MR,
                       PARTS = Op::PARTS;
  static constexpr bool OWN = simd::W == 16 && !Op::TILES;  // d_image by the thread that made its dS
  enum Source { SHARED, CACHED, SEPARATE };  // where E comes from: x under one shift, the cache, or two exponentials

 public:
  explicit InfoNceBackward(const InfoNceParams& params)
      : p(params),
        cols(p, block_size<Op>(p.D, PANEL_BUDGET, NR, B::columns(p))),
        negatives(p),
        cache(p),
        logits(log2_scale(p)),
        Kd(dwords<Op>(p.D)),
        Dp(round_up(p.D, NR)),
        direct(p.dtype == Dtype::f32),
        high(round_up(ceil_div(p.N, ceil_div(p.N, block_size<Op>(p.D, ROW_BUDGET, MR, MB))), MR)),
        super(cols.super_block(p.D * (8 * PARTS / P + (direct ? 0 : 4)))) {}  // packed twice, and an accumulator

  void run() {
    const bool rows = p.d_image, columns = p.d_text || p.d_extra;
    if (direct || !rows || super >= cols.count) return sweep(rows, columns, direct || !rows ? p.N : high, false);
    // 16-bit d_image over several column super-blocks: between two of them the fp32 sums wait as their upper half in
    // d_image itself and their lower half in a buffer. Beyond the budget (N D > 64 Mi) the towers take a recompute pass
    // each: 10 N^2 D instead of 8.
    if (p.N * p.D * 2 <= GRADIENT_BUDGET) return sweep(true, columns, p.N, true);
    sweep(true, false, GRADIENT_BUDGET / (4 * p.D), false);
    if (columns) sweep(false, true, p.N, false);
  }

 private:
  // Rows in super-blocks of `open_rows`, columns in super-blocks, row blocks, column blocks. `halved`: fp32 sums of
  // d_image are kept for one row block alone and parked in halves between column super-blocks.
  void sweep(bool want_rows, bool want_cols, int64_t open_rows, bool halved) {
    open_rows = std::clamp<int64_t>(round_up(open_rows, high), high, round_up(p.N, high));
    const bool recompute = !cache.complete(cols.count);
    // A step of some milliseconds is bound by what a core reads of the other's L2. Shared out evenly, a thread
    // multiplies the panels that it packed: 8 to 14% at N = 256 to 1024. Longer ones give a slow core less.
    const auto sharing = p.N * (p.M + p.K) <= (int64_t(1) << 31) / p.D ? omp_sched_static : omp_sched_dynamic;
    // Up to four panels are packed at a time: rows of D = 2048 lie a page apart, and one panel alone reads a line or
    // two of each (10% of the backward at N = 256, D = 2048 in fp32).
    const int64_t width = super * cols.NB, wide = NR * std::clamp<int64_t>(Dp / NR / (2 * p.threads), 1, 4);
    Buffer<float> norms(p.normalize ? p.N + p.M + p.K : 0), text_t(recompute ? width * Kd : 0),
        text_n(want_rows ? dwords<Op>(width) * Dp : 0), image_t(recompute ? high * Kd : 0);
    Buffer<float> image_n(want_cols ? dwords<Op>(high) * Dp : 0), ds(high * LDN + NR),
        ds_pairs(P == 2 && want_cols ? (high / 2) * LDP + NR : 0);
    Buffer<float> row_acc(want_rows && !direct ? (halved ? high : std::min(open_rows, p.N)) * p.D : 0),
        col_acc(want_cols && !direct ? width * p.D : 0);
    Buffer<float> scratch(p.threads * per_thread());
    Buffer<uint16_t> lower_halves(halved ? p.N * p.D : 0);
    const Rows images = image_rows(p, p.normalize ? norms.get() : nullptr),
               texts = text_rows(p, p.normalize ? norms + p.N : nullptr);
    auto row_out = [&](int64_t i, int64_t first) {
      return direct ? (float*)p.d_image + i * p.D : row_acc + (i - first) * p.D;
    };
    auto row_gradient = [&](int64_t i) { return (char*)p.d_image + i * p.D * size_of(p.dtype); };
    auto gradient_of = [&](int64_t j) { return j < p.M ? (char*)p.d_text : (char*)p.d_extra; };
    auto col_gradient = [&](int64_t j) { return gradient_of(j) + (j < p.M ? j : j - p.M) * p.D * size_of(p.dtype); };
    auto col_out = [&](int64_t j, int64_t at) { return direct ? (float*)col_gradient(j) : col_acc + at * p.D; };

#pragma omp parallel num_threads(p.threads)
    {
      [[maybe_unused]] const typename Op::Session session;
      omp_set_schedule(sharing, sharing == omp_sched_static ? 0 : 1);
      float *strip = scratch + omp_get_thread_num() * per_thread(), *a = strip + MR * LDS, *b = a + round_up(MB, 16),
            *narrow = b + NB + simd::W;
      if (p.normalize) {
        row_norms(images, norms);
        row_norms(texts, norms + p.N);
      }
      int64_t packed = -1;
      for (int64_t r0 = 0; r0 < p.N; r0 += open_rows) {
        const int64_t r1 = std::min(r0 + open_rows, p.N);
        for (int64_t b0 = 0; b0 < cols.count; b0 += super) {
          const int64_t b1 = std::min(b0 + super, cols.count);
          if (packed != b0) {
            if (recompute) cols.template pack<Op>(texts, b0, b1, text_t);
#pragma omp for collapse(2) schedule(runtime)
            for (int64_t d = 0; d < (want_rows ? Dp : 0); d += wide)
              for (int64_t k = b0; k < b1; k++) {
                const int64_t j0 = cols.begin(k), nb = cols.size(k), Kj = dwords<Op>(nb);
                pack_natural<Op>(texts, j0, j0 + nb, d, text_n + dwords<Op>((k - b0) * cols.NB) * Dp + d * Kj,
                                 std::min(wide, Dp - d) / NR, NR * Kj);
              }
            packed = b0;
          }
          for (int64_t i0 = r0; i0 < r1; i0 += high) {
            const int64_t mb = std::min<int64_t>(high, r1 - i0), Ki = dwords<Op>(mb), first = halved ? i0 : r0;
            if (halved && b0 > 0) {
#pragma omp for schedule(static) nowait
              for (int64_t i = i0; i < i0 + mb; i++)
                join_halves(row_out(i, first), (uint16_t*)row_gradient(i), lower_halves + i * p.D);
            }
#pragma omp for schedule(dynamic, 4) nowait
            for (int64_t i = 0; i < (recompute ? mb : 0); i += MR)
              pack_rows<Op>(images, i0 + i, i0 + std::min<int64_t>(i + MR, mb), image_t + i * Kd);
#pragma omp for schedule(runtime)
            for (int64_t d = 0; d < (want_cols ? Dp : 0); d += wide)
              pack_natural<Op>(images, i0, i0 + mb, d, image_n + d * Ki, std::min(wide, Dp - d) / NR, NR * Ki);
            for (int64_t k = b0; k < b1; k++) {
              const int64_t j0 = cols.begin(k), nb = cols.size(k), at = (k - b0) * cols.NB, Kj = dwords<Op>(nb);
              const Weights w(*this, a, b, i0, mb, j0, nb);
              int64_t own[MB / MR], count = 0;  // the strips of dS that this thread makes
#pragma omp for schedule(dynamic, 1) nowait
              for (int64_t i = 0; i < mb; i += MR) {
                float* out = P == 1 ? ds + i * LDN : strip;
                ds_strip(out, (int)std::min<int64_t>(MR, mb - i), i, k, image_t + i * Kd, text_t + at * Kd, w);
                if constexpr (P == 2)
                  round_strip(out, (int)std::min<int64_t>(MR, mb - i), nb, ds + i * LDN,
                              want_cols ? ds_pairs + (Op::TILES ? i * MR / 2 * PARTS : i / 2 * LDP) : nullptr,
                              high / 2 * PARTS);
                own[count++] = i;
              }
              const auto d_image_tile = [&](int64_t i, int64_t d) {
                gradient_tile<LDN, 1>((int)std::min<int64_t>(MR, mb - i), Kj, ds + i * LDN,
                                      text_n + dwords<Op>(at) * Dp + d * Kj, row_out(i0 + i, first), d, k > 0,
                                      k + 1 == cols.count ? row_gradient(i0 + i) : nullptr);
              };
              // Its own strips, in its L2 where blocks are 256 wide, wait for nobody: there, while neighbours filled
              // L3, d_image ran at 490 GFLOP/s so and at 450 shared out afresh. Narrower vectors lose 1 to 4%.
              if (want_rows && OWN)
                for (int64_t d0 = 0; d0 < p.D; d0 += part())
                  for (int64_t n = 0; n < count; n++)
                    for (int64_t d = d0; d < std::min(d0 + part(), p.D); d += NR) d_image_tile(own[n], d);
#pragma omp barrier
              if (want_rows && !OWN)
#pragma omp for schedule(runtime) nowait
                for (int64_t t = 0; t < groups(mb); t++) each_tile(t, mb, d_image_tile);
              // Without wanted columns the empty loop is the barrier that keeps dS until all have read it. (A second
              // dS, which spares the barrier, is no faster.)
#pragma omp for schedule(runtime)
              for (int64_t t = 0; t < (want_cols && gradient_of(j0) ? groups(nb) : 0); t++) {
                const int64_t c = t % ceil_div(nb, group_rows(nb)) * group_rows(nb);  // the group's first column
                if (NARROW) copy_columns(ds + c, std::min(group_rows(nb), nb - c), mb, narrow);
                each_tile(t, nb, [&](int64_t j, int64_t d) {
                  const float* A = NARROW      ? narrow + (j - c) * MB
                                   : Op::TILES ? ds_pairs + j * (high / 2) * PARTS
                                               : (P == 1 ? ds : ds_pairs) + j;
                  gradient_tile<1, NARROW ? MR : LDP>((int)std::min<int64_t>(MR, nb - j), Ki, A, image_n + d * Ki,
                                                      col_out(j0 + j, at + j), d, i0 > 0,
                                                      i0 + mb == p.N ? col_gradient(j0 + j) : nullptr);
                });
              }
            }
            if (halved) {
#pragma omp for schedule(static)
              for (int64_t i = i0; i < i0 + mb; i++)
                if (b1 < cols.count)
                  part_halves(row_out(i, first), (uint16_t*)row_gradient(i), lower_halves + i * p.D);
                else if (p.normalize)
                  finish(row_out(i, first), row_gradient(i), images, i);
            }
          }
          if (want_cols && r1 == p.N && p.normalize) {
#pragma omp for schedule(static)
            for (int64_t at = 0; at < (b1 - b0) * cols.NB; at++) {
              const int64_t k = b0 + at / cols.NB, j = cols.begin(k) + at % cols.NB;
              if (at % cols.NB < cols.size(k) && gradient_of(j)) finish(col_out(j, at), col_gradient(j), texts, j);
            }
          }
        }
        if (want_rows && !halved && p.normalize) {
#pragma omp for schedule(static)
          for (int64_t i = r0; i < r1; i++) finish(row_out(i, r0), row_gradient(i), images, i);
        }
      }
    }
  }

  // A gradient's rows x D in groups of register tiles, a task each. A strip of dS stays in L1 and panels of B stream
  // past it, from L2 as far as they fit: wider ones go in parts, which several strips share. AMX's panels do not fit
  // L1: groups of 128 x 256 read each of them from L2 or L3 for several tiles (narrower ones are 8% slower at N = 4096,
  // strips as high as one tile 12% at N = 256, D = 2048; k in runs that fit L1, summed in place or in a private tile, 5
  // to 15%).
  static constexpr int64_t PART = Op::TILES ? 8 * NR : simd::W == 16 ? 256 * P : 512;
  int64_t group_rows(int64_t rows) const {  // at least four groups for each thread
    if (Op::TILES || p.D <= PART) return Op::TILES ? 4 * MR : MR;
    return std::clamp<int64_t>(ceil_div(rows, MR) * ceil_div(p.D, part()) / (4 * p.threads), 1, 8) * MR;
  }
  int64_t part() const { return round_up(ceil_div(p.D, ceil_div(p.D, PART)), NR); }  // even: threads share them out
  int64_t groups(int64_t rows) const { return ceil_div(rows, group_rows(rows)) * ceil_div(p.D, part()); }
  template <class F>
  void each_tile(int64_t group, int64_t rows, F f) const {
    const int64_t high = group_rows(rows), down = ceil_div(rows, high), r0 = group % down * high,
                  d0 = group / down * part();
    for (int64_t d = d0; d < std::min(d0 + part(), p.D); d += NR)
      for (int64_t r = r0; r < std::min(r0 + high, rows); r += MR) f(r, d);
  }

  // Columns d .. d + NR - 1 of R rows of a gradient: sums = A B, or +=. The last product of a 16-bit gradient (`last`,
  // its first row) is rounded from its tile and not written to the sums, whose own pass took 2.6% of a step's
  // samples (N = 256, D = 2048, bf16).
  template <int RS, int KS>
  void gradient_tile(int R, int64_t K, const float* A, const float* B, float* sums, int64_t d, bool accumulate,
                     char* last) const {
    const int64_t left = p.D - d;
    if (direct || p.normalize || !last) return gemm_tile<Op, RS, KS>(R, K, A, B, sums + d, p.D, left, accumulate);
    if (accumulate)
      for (int64_t r = 0; r < R; r++)  // arrive while the product runs: 8% of the backward at N = 512 to 1024, D = 2048
        __builtin_prefetch(sums + r * p.D + d), __builtin_prefetch(sums + r * p.D + d + simd::W);
    alignas(64) float tile[MR * NR];
    gemm_tile<Op, RS, KS>(R, K, A, B, tile, NR, NR, false);
    for (int r = 0; r < R; r++, sums += p.D, last += p.D * size_of(p.dtype))
      for (int64_t h = 0; h < std::min<int64_t>(NR, left); h += simd::W) {
        simd::vec g = simd::load(tile + r * NR + h);
        if (accumulate) g = simd::add(g, simd::load_first(sums + d + h, left - h));
        store_from_float(p.dtype, last, d + h, g, left - h);
      }
  }

  // dS[0 .. mb-1][0 .. n-1] as panels [column tile][row][MR], MB rows apart. A tile of AVX2 reads 24 bytes of a row of
  // dS: in place they are a cache line each, 32 KiB for a tile, and its product runs at 77% of its rate from a panel.
  static constexpr bool NARROW = !Op::TILES && MR <= 8;
  void copy_columns(const float* dS, int64_t n, int64_t mb, float* out) const {
    for (int64_t j = 0; j < n; j += MR)
      for (int64_t i = 0; i < mb; i++) std::memcpy(out + j * MB + i * MR, dS + i * LDN + j, MR * sizeof(float));
  }

  void part_halves(const float* sum, uint16_t* upper, uint16_t* lower) const {
    for (int64_t d = 0; d < p.D; d++) {
      uint32_t u;
      std::memcpy(&u, sum + d, 4);
      upper[d] = (uint16_t)(u >> 16), lower[d] = (uint16_t)u;
    }
  }
  void join_halves(float* sum, const uint16_t* upper, const uint16_t* lower) const {
    for (int64_t d = 0; d < p.D; d++) {
      uint32_t u = (uint32_t)upper[d] << 16 | lower[d];
      std::memcpy(sum + d, &u, 4);
    }
  }
  int64_t per_thread() const {
    return round_up(MR * LDS + round_up(MB, 16) + NB + simd::W + (NARROW ? group_rows(NB) * MB : 0), 16);
  }

  float row_lse(int64_t i) const { return p.row_state[LSE_EXPONENT * p.N + i] + p.row_state[LSE_REMAINDER * p.N + i]; }
  float col_lse(int64_t j) const { return p.col_state[LSE_EXPONENT * p.M + j] + p.col_state[LSE_REMAINDER * p.M + j]; }
  float row_weight(int64_t i) const { return p.row_grad[i] * (float)p.scale; }
  float col_weight(int64_t j) const { return p.columns && j < p.M ? p.col_grad[j] * (float)p.scale : 0.f; }

  // Row and column factors of a block, dS = E (a_i + b_j): a_i = scale * row_grad 2^(shift - lse_i), b_j likewise. One
  // shift serves a block whose log-sum-exps lie within 90 bits: no x exceeds its own row's, so E <= 2^90 and a product
  // below 2^-126 is a gradient below 1e-10 of its row's.
  struct Weights {
    const InfoNceBackward& op;
    float *a, *b;
    int64_t i0, mb, j0, nb;
    float shift;
    bool shared;
    mutable float held = NAN;
    Weights(const InfoNceBackward& o, float* a_, float* b_, int64_t i0_, int64_t mb_, int64_t j0_, int64_t nb_)
        : op(o), a(a_), b(b_), i0(i0_), mb(mb_), j0(j0_), nb(nb_) {
      if (op.p.sigmoid) {
        shared = true, shift = 0.f;
        return;
      }
      float lo = INFINITY, hi = -INFINITY, nan = 0.f;
      auto see = [&](float v) { lo = std::min(lo, v), hi = std::max(hi, v), nan += 0.f * v; };
      for (int64_t i = i0; i < i0 + mb; i++) see(op.row_lse(i));
      for (int64_t j = j0; op.p.columns && j0 < op.p.M && j < j0 + nb; j++) see(op.col_lse(j));
      shared = hi - lo < 90.f && nan == 0.f && std::fabs(lo) < LARGE_LOGIT;
      shift = rintf(lo);
    }
    void hold(float m) const {
      if (m == held) return;
      held = m;
      fill(a, op.p.row_grad, op.p.row_state, op.p.N, i0, mb, m);
      if (op.p.columns && j0 < op.p.M)
        fill(b, op.p.col_grad, op.p.col_state, op.p.M, j0, nb, m);
      else
        std::fill_n(b, NB, 0.f);
    }
    void fill(float* out, const float* grad, const float* state, int64_t n, int64_t from, int64_t count,
              float m) const {
      const simd::vec scale = simd::set1((float)op.p.scale);
      for (int64_t k = 0; k < count; k += simd::W) {
        const int64_t left = count - k;
        simd::vec g = simd::mul(scale, simd::load_first(grad + from + k, left));
        if (!op.p.sigmoid) {
          simd::vec whole = simd::load_first(state + LSE_EXPONENT * n + from + k, left),
                    rest = simd::load_first(state + LSE_REMAINDER * n + from + k, left);
          g = simd::mul(g, exp2_sum<6>(simd::sub(simd::zero(), rest), simd::sub(simd::set1(m), whole)));
        }
        simd::storeu(out + k, g);
      }
    }
  };

  // One strip of dS (times scale), row i of the block on.
  void ds_strip(float* strip, int R, int64_t i, int64_t block, const float* A, const float* Bp,
                const Weights& w) const {
    const int64_t slot = cache.index(block, w.i0 + i);
    // A kept tile's rows and columns have a maximum within 90 bits of its shift: that is all its weights need.
    const bool cached = slot >= 0 && cache.shifts[slot] == cache.shifts[slot];
    const bool whole = negatives.whole_tile(w.i0 + i, R, w.j0, w.nb) && w.nb % NR == 0;
    if (!cached) dot_strip<Op>(strip, R, Kd, A, Bp, w.nb, 0, Kd);
    if (cached || w.shared) w.hold(cached ? cache.shifts[slot] : w.shift);
    const auto* tile = cached ? cache.tiles + slot * cache.TILE : nullptr;
    if (p.sigmoid)
      cached ? sigmoid_ds<true>(strip, tile, R, i, w) : sigmoid_ds<false>(strip, tile, R, i, w);
    else if (cached)
      whole ? softmax_ds<true, CACHED>(strip, tile, R, i, w) : softmax_ds<false, CACHED>(strip, tile, R, i, w);
    else if (w.shared)
      whole ? softmax_ds<true, SHARED>(strip, tile, R, i, w) : softmax_ds<false, SHARED>(strip, tile, R, i, w);
    else
      softmax_ds<false, SEPARATE>(strip, tile, R, i, w);
  }

  template <bool WHOLE, Source SOURCE>
  void softmax_ds(float* strip, const typename TileCache<Op>::elem* tile, int R, int64_t i, const Weights& w) const {
    const simd::vec shift = simd::set1(w.held);
    const bool smooth = p.label_smoothing > 0;
    const Logits<Op> lg = logits;
    const int64_t width = round_up(w.nb, NR);  // padding up to whole register tiles is written as zeros
    for (int r = 0; r < R; r++) {
      const int64_t gi = w.i0 + i + r, y = negatives.positive(gi) - w.j0;
      const simd::vec a = simd::set1(w.a[i + r]), ca = simd::set1(row_weight(gi));
      const simd::vec row_whole = simd::set1(p.row_state[LSE_EXPONENT * p.N + gi]),
                      row_rest = simd::set1(p.row_state[LSE_REMAINDER * p.N + gi]);
      const simd::vec row_uniform = simd::set1(smooth ? row_weight(gi) * p.row_state[UNIFORM * p.N + gi] : 0.f);
      float* s = strip + r * LDS;
      for (int64_t j = 0; j < width; j += simd::W) {
        simd::vec g, n, f;
        if constexpr (SOURCE == CACHED) {
          g = simd::mul(cache.load(tile + r * NB + j), simd::add(a, simd::load(w.b + j)));
        } else {
          if constexpr (SOURCE == SHARED) {
            lg.split_bounded(simd::load(s + j), n, f);
            g = simd::mul(simd::ldexp(exp2_fraction<Op::EXP2_DEGREE>(f), simd::sub(n, shift)),
                          simd::add(a, simd::load(w.b + j)));
          } else {
            lg.split(simd::load(s + j), n, f);
            g = simd::mul(ca, exp2_sum<6>(simd::sub(f, row_rest), simd::sub(n, row_whole)));
            if (p.columns && w.j0 < p.M) {
              const int64_t left = w.nb - j, at = w.j0 + j;
              simd::vec cw = simd::mul(simd::load_first(p.col_grad + at, left), simd::set1((float)p.scale));
              simd::vec whole = simd::load_first(p.col_state + LSE_EXPONENT * p.M + at, left),
                        rest = simd::load_first(p.col_state + LSE_REMAINDER * p.M + at, left);
              g = simd::fma(cw, exp2_sum<6>(simd::sub(f, rest), simd::sub(n, whole)), g);
            }
          }
        }
        if (smooth) g = simd::sub(g, simd::add(row_uniform, col_uniform(w, j)));
        if (!WHOLE) g = simd::select(negatives.lanes(gi, w.j0 + j, w.nb - j), g, simd::zero());
        simd::store(s + j, g);
      }
      if (!WHOLE && y >= 0 && y < w.nb) s[y] = positive_ds(gi, w.j0 + y);
    }
  }
  simd::vec col_uniform(const Weights& w, int64_t j) const {
    if (!p.columns || w.j0 >= p.M) return simd::zero();
    const int64_t left = w.nb - j, at = w.j0 + j;
    return simd::mul(simd::mul(simd::load_first(p.col_grad + at, left), simd::set1((float)p.scale)),
                     simd::load_first(p.col_state + UNIFORM * p.M + at, left));
  }
  // At the positive P - 1 = expm1(-nll): no cancellation however close to 1 the probability is.
  float positive_ds(int64_t i, int64_t j) const {
    const auto slope = [&](const float* state, int64_t n, int64_t at) {
      if (p.label_smoothing == 0) return std::expm1(-state[LOSS * n + at]);
      return std::expm1(-state[NLL * n + at]) + ((float)p.label_smoothing - state[UNIFORM * n + at]);
    };
    const float g = row_weight(i) * slope(p.row_state, p.N, i);
    return p.columns ? g + col_weight(j) * slope(p.col_state, p.M, j) : g;
  }

  template <bool FROM_CACHE>
  void sigmoid_ds(float* strip, const typename TileCache<Op>::elem* tile, int R, int64_t i, const Weights& w) const {
    const simd::vec scale = simd::set1((float)p.scale), bias = simd::set1((float)p.bias), zero = simd::zero(),
                    one = simd::set1(1.f);
    for (int r = 0; r < R; r++) {
      const int64_t gi = w.i0 + i + r;
      const simd::vec a = simd::set1(w.a[i + r]);
      float* s = strip + r * LDS;
      for (int64_t j = 0; j < round_up(w.nb, NR); j += simd::W) {
        const simd::mask neg = negatives.lanes(gi, w.j0 + j, w.nb - j),
                         pos = simd::lane(negatives.positive(gi) - w.j0 - j);
        simd::vec d;
        if (FROM_CACHE) {
          d = cache.load(tile + r * NB + j);
        } else {
          const simd::vec x = simd::fma(simd::load(s + j), scale, bias), y = simd::select(pos, simd::sub(zero, x), x);
          const simd::vec e = exp_nonpositive(simd::sub(zero, simd::abs(y))), q = simd::div(one, simd::add(one, e));
          d = simd::select(simd::less(y, zero), simd::mul(e, q), q);
          d = simd::select(pos, simd::sub(zero, d), d);
        }
        simd::store(s + j, simd::select(simd::either(neg, pos), simd::mul(a, d), zero));
      }
    }
  }

  // fp32 dS -> bf16 (or parts in bf16) twice, as the A of either product: for d_image by rows, pairs along columns; for
  // d_text pairs of rows, [pair][column], or for AMX panels of 32 columns, `panel_rows` rows of 32 dwords each.
  void round_strip(const float* strip, int R, int64_t nb, float* by_rows, float* by_pairs,
                   [[maybe_unused]] int64_t panel_rows) const {
#if defined(LIMBER_BF16_PAIRS)
    auto pairs = [&](int r, int64_t j) {
      if (r >= R) return Dwords<Op>{};
      const simd::vec v[2] = {simd::load(strip + r * LDS + j), simd::load(strip + r * LDS + j + simd::W)};
      return to_dwords<Op>(v);
    };
    for (int64_t j = 0; j < nb; j += NR) {
      simd::vec lo[PARTS][MR / 2], hi[PARTS][MR / 2];
      for (int r = 0; r < (Op::TILES ? MR : R); r += 2) {
        const auto x = pairs(r, j), y = pairs(r + 1, j);
        for (int q = 0; q < PARTS; q++) {
          float* out = by_rows + (Op::TILES ? (j * PARTS / 2 + q * simd::W) * MR + r * simd::W : r * LDN + j / 2);
          simd::store(out, x.part[q]);
          if (Op::TILES || r + 1 < R) simd::store(out + (Op::TILES ? simd::W : LDN), y.part[q]);
          simd::zip_rows(x.part[q], y.part[q], lo[q][r / 2], hi[q][r / 2]);
          if (Op::TILES || !by_pairs) continue;
          simd::store(by_pairs + r / 2 * LDP + j, lo[q][r / 2]);
          simd::store(by_pairs + r / 2 * LDP + j + simd::W, hi[q][r / 2]);
        }
      }
      if constexpr (Op::TILES)
        for (int q = 0; by_pairs && q < PARTS; q++) {
          simd::transpose(lo[q]), simd::transpose(hi[q]);
          float* out = by_pairs + j * panel_rows + q * MR * simd::W;
          for (int c = 0; c < simd::W; c++, out += simd::W)
            simd::store(out, lo[q][c]), simd::store(out + MR / 2 * simd::W, hi[q][c]);
        }
    }
#endif
  }

  // The gradient through the fused normalisation u = x / |x|, from its fp32 sums: (g - u <u, g>) / |x|, or g / eps
  // where |x| < eps.
  void finish(const float* acc, void* out, const Rows& rows, int64_t i) const {
    const void* x = rows.row(i);
    const float norm = rows.norm[i];
    const simd::vec divisor = simd::set1(norm);
    auto unit = [&](int64_t d) { return simd::div(load_as_float(p.dtype, x, d, p.D - d), divisor); };
    simd::vec along = simd::zero();
    if (norm != Rows::EPS)
      for (int64_t d = 0; d < p.D; d += simd::W) along = simd::fma(simd::load_first(acc + d, p.D - d), unit(d), along);
    const simd::vec radial = simd::set1(-simd::sum(along));
    for (int64_t d = 0; d < p.D; d += simd::W) {
      const simd::vec g = simd::div(simd::fma(radial, unit(d), simd::load_first(acc + d, p.D - d)), divisor);
      store_from_float(p.dtype, out, d, g, p.D - d);
    }
  }

  const InfoNceParams& p;
  const Columns cols;
  const Negatives negatives;
  const TileCache<Op> cache;
  const Logits<Op> logits;
  const int64_t Kd, Dp;
  const bool direct;   // gradients are fp32: accumulate in place
  const int64_t high;  // rows of a block, even: 512 as 504 + 8 instead of 258 + 254 cost 7% of the backward
  const int64_t super;
};

}  // namespace limber
