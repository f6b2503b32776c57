// AVX-512 (F, BW, VL, DQ, VNNI, BF16): 16 floats, real mask registers, native bf16 pair products. The AMX build takes
// all but its bf16 products from here.
#pragma once
#include <immintrin.h>

#include <cstdint>

namespace limber {

struct simd {
  using vec = __m512;
  using mask = __mmask16;
  static constexpr int W = 16;  // floats in a vector
  static constexpr int MR =
      14;  // rows of the register tile: 14 x 2 accumulators + 2 of B + 1 broadcast = 31 of 32 registers
#if defined(LIMBER_ISA_AMX)
  static constexpr const char* name = "amx";
#else
  static constexpr const char* name = "avx512";
#endif

  static vec zero() { return _mm512_setzero_ps(); }
  static vec set1(float x) { return _mm512_set1_ps(x); }
  static vec load(const float* p) { return _mm512_load_ps(p); }
  static vec loadu(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, vec v) { _mm512_store_ps(p, v); }
  static void storeu(float* p, vec v) { _mm512_storeu_ps(p, v); }
  // Past the caches, to an address of whole lines; a thread ends with the fence.
  static void stream(float* p, vec v) { _mm512_stream_ps(p, v); }
  static void stream_end() { _mm_sfence(); }
  static vec add(vec a, vec b) { return _mm512_add_ps(a, b); }
  static vec sub(vec a, vec b) { return _mm512_sub_ps(a, b); }
  static vec mul(vec a, vec b) { return _mm512_mul_ps(a, b); }
  static vec div(vec a, vec b) { return _mm512_div_ps(a, b); }
  static vec fma(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }  // a b + c
  static vec fms(vec a, vec b, vec c) { return _mm512_fmsub_ps(a, b, c); }  // a b - c
  static vec max(vec a, vec b) { return _mm512_max_ps(a, b); }
  static vec min(vec a, vec b) { return _mm512_min_ps(a, b); }
  static vec abs(vec a) { return _mm512_abs_ps(a); }
  static vec round(vec a) { return _mm512_roundscale_ps(a, 0x08); }
  static vec ldexp(vec p, vec n) { return _mm512_scalef_ps(p, n); }  // p 2^n, n integer-valued, any size
  static float sum(vec v) { return _mm512_reduce_add_ps(v); }
  static float hmax(vec v) { return _mm512_reduce_max_ps(v); }
  static float hmin(vec v) { return _mm512_reduce_min_ps(v); }

  static mask first(int64_t n) { return n >= W ? 0xffff : n <= 0 ? 0 : (1u << n) - 1; }  // lanes 0 .. n-1
  static mask lane(int64_t d) { return d >= 0 && d < W ? 1u << d : 0; }  // lane d alone, if there is one
  static mask eq(const int32_t* p, int32_t key, mask m) {
    return _mm512_mask_cmpeq_epi32_mask(m, _mm512_maskz_loadu_epi32(m, p), _mm512_set1_epi32(key));
  }
  static mask less(vec a, vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
  static mask andnot(mask a, mask b) { return a & ~b; }  // a and not b
  static mask either(mask a, mask b) { return a | b; }
  static int count(mask m) { return __builtin_popcount(m); }
  static vec select(mask m, vec a, vec b) { return _mm512_mask_mov_ps(b, m, a); }  // m ? a : b

  static vec load_first(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(first(n), p); }
  static void store_first(float* p, vec v, int64_t n) { _mm512_mask_storeu_ps(p, first(n), v); }
  static vec load_bf16(const uint16_t* p, int64_t n) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first(n), p)), 16));
  }
  static vec load_i8(const int8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
  }
  static vec load_f16(const uint16_t* p, int64_t n) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p)); }
  // vcvtneps2bf16 flushes denormals and is otherwise round-to-nearest-even, as torch rounds.
  static void store_bf16(uint16_t* p, vec v, int64_t n) {
    _mm256_mask_storeu_epi16(p, first(n), (__m256i)_mm512_cvtneps_pbh(v));
  }
  static void store_f16(uint16_t* p, vec v, int64_t n) {
    _mm256_mask_storeu_epi16(p, first(n), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }

  static void transpose(vec v[W]) {  // 16 x 16 dwords
    __m512i r[16], t[16];
    for (int i = 0; i < 16; i++) r[i] = _mm512_castps_si512(v[i]);
    for (int i = 0; i < 16; i += 2) {
      t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
      t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
      for (int h = 0; h < 2; h++) {
        r[i + 2 * h] = _mm512_unpacklo_epi64(t[i + h], t[i + h + 2]);
        r[i + 2 * h + 1] = _mm512_unpackhi_epi64(t[i + h], t[i + h + 2]);
      }
    for (int q = 0; q < 4; q++) {  // r[4b + q]: rows 4b .. 4b+3 of columns q, q+4, q+8, q+12
      __m512i a = _mm512_shuffle_i32x4(r[q], r[4 + q], 0x88), b = _mm512_shuffle_i32x4(r[q], r[4 + q], 0xdd);
      __m512i c = _mm512_shuffle_i32x4(r[8 + q], r[12 + q], 0x88), d = _mm512_shuffle_i32x4(r[8 + q], r[12 + q], 0xdd);
      v[q] = _mm512_castsi512_ps(_mm512_shuffle_i32x4(a, c, 0x88));
      v[q + 8] = _mm512_castsi512_ps(_mm512_shuffle_i32x4(a, c, 0xdd));
      v[q + 4] = _mm512_castsi512_ps(_mm512_shuffle_i32x4(b, d, 0x88));
      v[q + 12] = _mm512_castsi512_ps(_mm512_shuffle_i32x4(b, d, 0xdd));
    }
  }

  // ---- bf16 pairs: a 'dword' holds two neighbours along k
  static vec dot_pairs(vec c, vec a, vec b) { return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b); }
  static vec load_pairs(const uint16_t* p, int64_t n) {
    return _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(n >= 32 ? ~0u : n <= 0 ? 0 : (1u << n) - 1, p));
  }
  static vec round_pairs(vec lo, vec hi) {
    return _mm512_castsi512_ps((__m512i)_mm512_cvtne2ps_pbh(hi, lo));
  }  // 32 floats in order
#if defined(LIMBER_ISA_AMX)
  // 32 floats, each the sum of N bf16, largest first. Three hold all 24 bits of a float.
  template <int N>
  static void split_pairs(vec lo, vec hi, vec* part) {
    for (int q = 0; q < N; q++) {
      part[q] = round_pairs(lo, hi);
      if (q + 1 == N) break;
      const __m512i u = _mm512_castps_si512(part[q]);
      auto widen = [](__m256i h) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16)); };
      lo = sub(lo, widen(_mm512_castsi512_si256(u))), hi = sub(hi, widen(_mm512_extracti64x4_epi64(u, 1)));
    }
  }
#endif
  // Two rows of 32 bf16 -> 32 row pairs, columns in order.
  static void zip_rows(vec a, vec b, vec& lo, vec& hi) {
    const __m512i even = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6,
                                          37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i odd = _mm512_add_epi16(even, _mm512_set1_epi16(16));
    lo = _mm512_castsi512_ps(_mm512_permutex2var_epi16(_mm512_castps_si512(a), even, _mm512_castps_si512(b)));
    hi = _mm512_castsi512_ps(_mm512_permutex2var_epi16(_mm512_castps_si512(a), odd, _mm512_castps_si512(b)));
  }
};

}  // namespace limber
