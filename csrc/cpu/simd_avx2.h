// AVX2 + FMA + F16C: 8 floats, masks are vectors. bf16 and fp16 are widened to fp32 when packed.
#pragma once
#include <immintrin.h>

#include <cmath>
#include <cstdint>

namespace limber {

struct simd {
  using vec = __m256;
  using mask = __m256;
  static constexpr int W = 8;
  static constexpr int MR =
      6;  // 6 x 2 accumulators + 2 of B + 1 broadcast = 15 of 16 registers: 98% of the FMA peak; 4 x 3 is no better
  static constexpr const char* name = "avx2";

  static vec zero() { return _mm256_setzero_ps(); }
  static vec set1(float x) { return _mm256_set1_ps(x); }
  static vec load(const float* p) { return _mm256_load_ps(p); }
  static vec loadu(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, vec v) { _mm256_store_ps(p, v); }
  static void storeu(float* p, vec v) { _mm256_storeu_ps(p, v); }
  static vec add(vec a, vec b) { return _mm256_add_ps(a, b); }
  static vec sub(vec a, vec b) { return _mm256_sub_ps(a, b); }
  static vec mul(vec a, vec b) { return _mm256_mul_ps(a, b); }
  static vec div(vec a, vec b) { return _mm256_div_ps(a, b); }
  static vec fma(vec a, vec b, vec c) { return _mm256_fmadd_ps(a, b, c); }
  static vec fms(vec a, vec b, vec c) { return _mm256_fmsub_ps(a, b, c); }
  static vec max(vec a, vec b) { return _mm256_max_ps(a, b); }
  static vec min(vec a, vec b) { return _mm256_min_ps(a, b); }
  static vec abs(vec a) { return _mm256_andnot_ps(set1(-0.0f), a); }
  static vec round(vec a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static vec ldexp(vec p, vec n) {  // exponent bits 0 below -126 and 255 above 127: exactly 0 and inf
    __m256i e = _mm256_cvtps_epi32(max(min(n, set1(128.f)), set1(-127.f)));
    return mul(p, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(e, _mm256_set1_epi32(127)), 23)));
  }
  template <class F>
  static float fold(vec v, F f) {
    __m128 x = f(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    x = f(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(f(x, _mm_shuffle_ps(x, x, 1)));
  }
  static float sum(vec v) {
    return fold(v, [](__m128 a, __m128 b) { return _mm_add_ps(a, b); });
  }
  static float hmax(vec v) {
    return fold(v, [](__m128 a, __m128 b) { return _mm_max_ps(a, b); });
  }
  static float hmin(vec v) {
    return fold(v, [](__m128 a, __m128 b) { return _mm_min_ps(a, b); });
  }

  static __m256i iota() { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }
  static int clamp(int64_t n) { return n < -1 ? -1 : n > W ? W : (int)n; }
  static mask first(int64_t n) { return _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(clamp(n)), iota())); }
  static mask lane(int64_t d) { return _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_set1_epi32(clamp(d)), iota())); }
  static mask eq(const int32_t* p, int32_t key, mask m) {
    __m256i k = _mm256_maskload_epi32(p, _mm256_castps_si256(m));
    return _mm256_and_ps(m, _mm256_castsi256_ps(_mm256_cmpeq_epi32(k, _mm256_set1_epi32(key))));
  }
  static mask less(vec a, vec b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
  static mask andnot(mask a, mask b) { return _mm256_andnot_ps(b, a); }
  static mask either(mask a, mask b) { return _mm256_or_ps(a, b); }
  static int count(mask m) { return __builtin_popcount(_mm256_movemask_ps(m)); }
  static vec select(mask m, vec a, vec b) { return _mm256_blendv_ps(b, a, m); }

  static vec load_first(const float* p, int64_t n) {
    return n >= W ? loadu(p) : _mm256_maskload_ps(p, _mm256_castps_si256(first(n)));
  }
  // In halves and quarters: vmaskmovps to memory is microcode on Zen, and a panel of 6 rows stores 6 at each k.
  static __attribute__((always_inline)) void store_first(float* p, vec v, int64_t n) {
    if (n >= W) return storeu(p, v);
    __m128 x = _mm256_castps256_ps128(v);
    if (n >= 4) _mm_storeu_ps(p, x), x = _mm256_extractf128_ps(v, 1), p += 4, n -= 4;
    if (n >= 2) _mm_storel_pi((__m64*)p, x), x = _mm_movehl_ps(x, x), p += 2, n -= 2;
    if (n >= 1) _mm_store_ss(p, x);
  }
  static __m128i load_u16(const uint16_t* p, int64_t n) {
    if (n >= W) return _mm_loadu_si128((const __m128i*)p);
    alignas(16) uint16_t t[W] = {};
    for (int64_t i = 0; i < n; i++) t[i] = p[i];
    return _mm_load_si128((const __m128i*)t);
  }
  static void store_u16(uint16_t* p, __m128i v, int64_t n) {
    alignas(16) uint16_t t[W];
    _mm_store_si128((__m128i*)t, v);
    for (int64_t i = 0; i < n && i < W; i++) p[i] = t[i];
  }
  static vec load_bf16(const uint16_t* p, int64_t n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_u16(p, n)), 16));
  }
  static vec load_i8(const int8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
  }
  static vec load_f16(const uint16_t* p, int64_t n) { return _mm256_cvtph_ps(load_u16(p, n)); }
  static void store_bf16(uint16_t* p, vec v, int64_t n) {  // round to nearest even; NaN stays NaN
    __m256i u = _mm256_castps_si256(v), odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    u = _mm256_srli_epi32(_mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    u = _mm256_blendv_epi8(u, _mm256_set1_epi32(0x7fc0), _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q)));
    store_u16(p, _mm_packus_epi32(_mm256_castsi256_si128(u), _mm256_extracti128_si256(u, 1)), n);
  }
  static void store_f16(uint16_t* p, vec v, int64_t n) {
    store_u16(p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT), n);
  }

  static void transpose(vec v[W]) {  // 8 x 8
    vec t[8];
    for (int i = 0; i < 8; i += 2) {
      t[i] = _mm256_unpacklo_ps(v[i], v[i + 1]);
      t[i + 1] = _mm256_unpackhi_ps(v[i], v[i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
      for (int h = 0; h < 2; h++) {
        v[i + 2 * h] = _mm256_shuffle_ps(t[i + h], t[i + h + 2], 0x44);
        v[i + 2 * h + 1] = _mm256_shuffle_ps(t[i + h], t[i + h + 2], 0xee);
      }
    for (int i = 0; i < 4; i++) {
      t[i] = _mm256_permute2f128_ps(v[i], v[i + 4], 0x20);
      t[i + 4] = _mm256_permute2f128_ps(v[i], v[i + 4], 0x31);
    }
    for (int i = 0; i < 8; i++) v[i] = t[i];
  }
};

}  // namespace limber
