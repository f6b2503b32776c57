// Register-blocked products over packed panels: C[R x NR] (+)= A B with all of K in registers, C touched once.
//
// One micro-kernel serves every product of an op; only the strides of A differ:
//   packed A panel [k][MR]        row stride 1,   k stride MR
//   row-major tile read in place  row stride ld,  k stride 1
//   its transpose read in place   row stride 1,   k stride ld
// B is a packed panel [k][NR]. MR x NR is 14 x 32 on AVX-512, 6 x 16 on AVX2, 32 x 32 on AMX. Strides are in dwords
// (see rows.h).
#pragma once
#include <algorithm>

#include "rows.h"

namespace limber {

constexpr int NR = 2 * simd::W;

// C is read and written in full vectors; gemm_tile gives the ragged edge a private tile.
template <class Op, int R, int RS, int KS, bool ACC>
static inline __attribute__((always_inline)) void micro(int64_t K, const float* A, const float* B, float* C,
                                                        int64_t ldc) {
  constexpr int AHEAD = simd::W == 16 ? 32 : 16;  // 4 KiB on AVX-512: 1 to 3% over 2 KiB on Zen 5
  simd::vec acc[R][2];
#pragma GCC unroll 16
  for (int r = 0; r < R; r++) {
    acc[r][0] = acc[r][1] = simd::zero();
    if (ACC) __builtin_prefetch(C + r * ldc, 1), __builtin_prefetch(C + r * ldc + simd::W, 1);  // arrives while K runs
  }
#pragma GCC unroll 2
  for (int64_t k = 0; k < K; k++, A += KS, B += NR) {
    __builtin_prefetch(B + AHEAD * NR);
    if (simd::W == 16) __builtin_prefetch(B + AHEAD * NR + simd::W);  // elsewhere the same line
    if (KS > Op::MR) __builtin_prefetch(A + 16 * KS);                 // a packed panel comes by itself; 2 to 5% on SSE
    simd::vec b0 = simd::load(B), b1 = simd::load(B + simd::W);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      simd::vec a = simd::set1(A[r * RS]);
      acc[r][0] = Op::madd(acc[r][0], a, b0);
      acc[r][1] = Op::madd(acc[r][1], a, b1);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; r++) {
    float* c = C + r * ldc;
    if (ACC)
      acc[r][0] = simd::add(acc[r][0], simd::loadu(c)), acc[r][1] = simd::add(acc[r][1], simd::loadu(c + simd::W));
    simd::storeu(c, acc[r][0]);
    simd::storeu(c + simd::W, acc[r][1]);
  }
}

// Every element sees the same sequence of operations whatever the height of the tile it falls in: equal rows give equal
// results.
template <class Op, int RS, int KS, bool ACC>
static __attribute__((noinline)) void micro_rows(int R, int64_t K, const float* A, const float* B, float* C,
                                                 int64_t ldc) {
  if (R == Op::MR) return micro<Op, Op::MR, RS, KS, ACC>(K, A, B, C, ldc);
  for (; R >= 4; R -= 4, A += 4 * RS, C += 4 * ldc) micro<Op, 4, RS, KS, ACC>(K, A, B, C, ldc);
  for (; R >= 1; R -= 1, A += RS, C += ldc) micro<Op, 1, RS, KS, ACC>(K, A, B, C, ldc);
}

// K goes in chains of 128 dwords: one chain over D = 512 has twice the rounding error of eager, and is no faster.
template <class Op, int RS, int KS>
static inline void vector_gemm(int R, int64_t K, const float* A, const float* B, float* C, int64_t ldc, int64_t cols,
                               bool accumulate) {
  constexpr int64_t CHAIN = 128;
  auto chains = [&](float* c, int64_t ld, bool add) {
    for (int64_t k = 0; k < K; k += CHAIN, add = true)
      if (add)
        micro_rows<Op, RS, KS, true>(R, std::min(CHAIN, K - k), A + k * KS, B + k * NR, c, ld);
      else
        micro_rows<Op, RS, KS, false>(R, std::min(CHAIN, K - k), A + k * KS, B + k * NR, c, ld);
  };
  if (cols >= NR) return chains(C, ldc, accumulate);
  alignas(64) float edge[Op::MR * NR];
  chains(edge, NR, false);
  for (int r = 0; r < R; r++)
    for (int64_t j = 0; j < cols; j++) C[r * ldc + j] = edge[r * NR + j] + (accumulate ? C[r * ldc + j] : 0.f);
}

// C[R x min(cols, NR)] = A B, or += with accumulate. AMX tiles read packed panels alone.
template <class Op, int RS, int KS>
static inline void gemm_tile(int R, int64_t K, const float* A, const float* B, float* C, int64_t ldc, int64_t cols,
                             bool accumulate) {
#if defined(LIMBER_ISA_AMX)
  if constexpr (Op::TILES) return tile_gemm<Op::PARTS>(R, K, A, B, C, ldc, cols, accumulate);
#endif
  if constexpr (!Op::TILES) vector_gemm<Op, RS, KS>(R, K, A, B, C, ldc, cols, accumulate);
}

// A matrix to be packed is any `Source` with rows: load<Op>(row, end, feature) gives dwords as Rows does. With several
// parts a step of k, W dwords, holds them one after the other.
// Transposed panels: dst[panel][k][WIDTH] dwords from rows begin .. end-1, WIDTH rows a panel, zero padded; k runs over
// all of D.
template <class Op, int WIDTH, class Source>
static void pack_transposed(const Source& rows, int64_t begin, int64_t end, float* dst) {
  constexpr int W = simd::W, PARTS = Op::PARTS;
  const int64_t Kd = dwords<Op>(rows.D);
  for (int64_t p = begin; p < end; p += WIDTH, dst += Kd * WIDTH)
    for (int h = 0; h < WIDTH; h += W)
      for (int64_t k = 0; k < Kd; k += W * PARTS) {
        simd::vec v[PARTS][W];
        for (int i = 0; i < W; i++) {
          const auto x = rows.template load<Op>(h + i < WIDTH ? p + h + i : end, end, k / PARTS * Op::P);
          for (int q = 0; q < PARTS; q++) v[q][i] = x.part[q];
        }
        for (int q = 0; q < PARTS; q++) {
          simd::transpose(v[q]);
          for (int i = 0; i < W && k + q * W + i < Kd; i++)
            simd::store_first(dst + (k + q * W + i) * WIDTH + h, v[q][i], WIDTH - h);
        }
      }
}

// What a register tile reads as A: panels of MR rows, transposed, or AMX's [step][part][half][16][16] (tile_amx.h).
template <class Op, class Source>
static void pack_rows(const Source& rows, int64_t begin, int64_t end, float* dst) {
  if constexpr (!Op::TILES)
    return pack_transposed<Op, Op::MR>(rows, begin, end, dst);
  else
    for (int64_t p = begin; p < end; p += Op::MR)
      for (int64_t d = 0; d < rows.D; d += Op::P * Op::K_STEP, dst += Op::PARTS * Op::MR * simd::W)
        for (int r = 0; r < Op::MR; r++) {
          const auto x = rows.template load<Op>(p + r, end, d);
          for (int q = 0; q < Op::PARTS; q++) simd::store(dst + (q * Op::MR + r) * simd::W, x.part[q]);
        }
}

// Natural panels: dst[panel][k][NR] dwords, `apart` dwords from one to the next, for features d .. d + panels NR - 1 of
// rows begin .. end-1; k is a row, or a pair of rows for bf16.
template <class Op, class Source>
static void pack_natural(const Source& rows, int64_t begin, int64_t end, int64_t d, float* dst, int64_t panels = 1,
                         int64_t apart = 0) {
  constexpr int W = simd::W, AHEAD = 8;
  const int64_t padded = begin + dwords<Op>(end - begin) / Op::PARTS * Op::P;
  for (int64_t i = begin, k = 0; i < padded; i += Op::P, k++) {
    // Panels are a few cache lines of each row, which no hardware prefetcher foresees.
    for (int64_t next = i + AHEAD; next < std::min(i + AHEAD + Op::P, end); next++)
      for (int64_t at = 0; at < panels * NR * size_of(rows.dtype); at += 64)
        __builtin_prefetch((const char*)rows.row(next) + d * size_of(rows.dtype) + at);
    float* to = dst;
    for (int64_t f = d; f < d + panels * NR; f += NR, to += apart)
      if constexpr (Op::P == 1)
        for (int h = 0; h < 2; h++)
          simd::store(to + k * NR + h * W,
                      f + h * W < rows.D ? rows.template load<Op>(i, end, f + h * W).part[0] : simd::zero());
#if defined(LIMBER_BF16_PAIRS)
      else {
        const auto x = rows.template load<Op>(i, end, f), y = rows.template load<Op>(i + 1, end, f);
        for (int q = 0; q < Op::PARTS; q++) {
          float* out = to + ((k / W * Op::PARTS + q) * W + k % W) * NR;
          simd::vec lo, hi;
          simd::zip_rows(x.part[q], y.part[q], lo, hi);
          simd::store(out, lo);
          simd::store(out + W, hi);
        }
      }
#endif
  }
}

}  // namespace limber
