// Products of unsigned activations and packed int8 weights, exact in int32: sums[R][32] (+)= A B for one block of 32
// output channels.
//
// B is [groups][32][4] as packed; a group is 4 neighbours along the reduction. A is a panel [groups][R][4] of bytes, on
// AMX tiles [step][R][64] with 16 groups a step. Reductions of up to 65536 fit: 65536 * 255 * 127 < 2^31.
#pragma once
#include <utility>

#include "rows.h"

namespace limber {

constexpr int BLOCK = 32;                   // output channels of a packed block
constexpr int64_t BLOCK_GROUP = 4 * BLOCK;  // bytes of a group of a block
constexpr int64_t INT8_K_STEP = 64;         // what the reduction is padded to
constexpr int64_t MOST_REDUCED = int64_t(1) << 16;

// What a product asks of memory for the next one, a line or two a group: nothing, its own block some way ahead into L1
// (where it is the only one over that block), or the next block into L2. For several products over a block, L1 instead
// of L2 gives 77% instead of 95% of the dot products' peak (16 rows).
enum class Ahead { none, own_block, next_block };
constexpr int64_t OWN_BLOCK_AHEAD = 2048;  // 4096: 4.6 instead of 3.9 ms for one row of 8 bits by 28672 x 4096

#if defined(LIMBER_BF16_PAIRS)

// Constant indices and one-line assembly: GCC 12 keeps arrays of accumulators in memory around the intrinsic, and then
// reaches 31-43% of the peak instead of 94%.
template <class F, int... I>
static inline __attribute__((always_inline)) void each(F f, std::integer_sequence<int, I...>) {
  (f(std::integral_constant<int, I>{}), ...);
}

template <int R, Ahead KIND>
static __attribute__((noinline)) void dot_rows(int64_t groups, const uint8_t* A, const int8_t* B, int32_t* sums,
                                               bool accumulate, const char* ahead, int64_t period) {
  constexpr auto rows = std::make_integer_sequence<int, R>{};
  __m512i c[R][2];
  each([&](auto r) __attribute__((always_inline)) { c[r][0] = c[r][1] = _mm512_setzero_si512(); }, rows);
  const int32_t* a = (const int32_t*)A;
  for (int64_t g = 0; g < groups; g++, a += R, B += BLOCK_GROUP) {
    const __m512i b0 = _mm512_loadu_si512(B), b1 = _mm512_loadu_si512(B + 64);
    // In the loop itself: GCC takes a lambda that only prefetches for one without effects, and drops it.
    if (KIND == Ahead::own_block)
      __builtin_prefetch(B + OWN_BLOCK_AHEAD, 0, 3), __builtin_prefetch(B + OWN_BLOCK_AHEAD + 64, 0, 3);
    if (KIND == Ahead::next_block && (g & (period - 1)) == 0) __builtin_prefetch(ahead, 0, 2), ahead += 64;
    each(
        [&](auto r) __attribute__((always_inline)) {
          const __m512i x = _mm512_set1_epi32(a[r]);
          asm("vpdpbusd %2, %1, %0" : "+v"(c[r][0]) : "v"(x), "v"(b0));
          asm("vpdpbusd %2, %1, %0" : "+v"(c[r][1]) : "v"(x), "v"(b1));
        },
        rows);
  }
  each(
      [&](auto r) __attribute__((always_inline)) {
        int32_t* s = sums + r * BLOCK;
        for (int h = 0; h < 2; h++)
          _mm512_storeu_si512(s + 16 * h,
                              accumulate ? _mm512_add_epi32(c[r][h], _mm512_loadu_si512(s + 16 * h)) : c[r][h]);
      },
      rows);
}

constexpr int DOT_ROWS = 14;  // 14 x 2 accumulators, 2 of B and one of A: 31 of 32 registers

template <Ahead KIND, int... R>
static void dot_dispatch(int rows, std::integer_sequence<int, R...>, int64_t groups, const uint8_t* A, const int8_t* B,
                         int32_t* sums, bool accumulate, const char* ahead, int64_t period) {
  using Kernel = void (*)(int64_t, const uint8_t*, const int8_t*, int32_t*, bool, const char*, int64_t);
  static constexpr Kernel kernels[] = {dot_rows<R + 1, KIND>...};
  kernels[rows - 1](groups, A, B, sums, accumulate, ahead, period);
}
static inline void dot_block(int rows, int64_t groups, const uint8_t* A, const int8_t* B, int32_t* sums,
                             bool accumulate, Ahead kind, const char* ahead, int64_t period) {
  constexpr auto heights = std::make_integer_sequence<int, DOT_ROWS>{};
  if (kind == Ahead::own_block)
    dot_dispatch<Ahead::own_block>(rows, heights, groups, A, B, sums, accumulate, ahead, period);
  else if (kind == Ahead::next_block)
    dot_dispatch<Ahead::next_block>(rows, heights, groups, A, B, sums, accumulate, ahead, period);
  else
    dot_dispatch<Ahead::none>(rows, heights, groups, A, B, sums, accumulate, ahead, period);
}

// sums - zero * weight_sums, as floats: exact, for int32 wraps around.
static inline simd::vec compensated(const int32_t* sums, int32_t zero, const int32_t* weight_sums) {
  return _mm512_cvtepi32_ps(_mm512_sub_epi32(
      _mm512_loadu_si512(sums), _mm512_mullo_epi32(_mm512_set1_epi32(zero), _mm512_loadu_si512(weight_sums))));
}

#else

constexpr int DOT_ROWS = 16;

#if defined(LIMBER_ISA_AVX2)

// vpmaddubsw saturates its 16-bit pairs (u8 x s8 reaches 2 * 255 * 127): both sides are widened and multiplied by
// vpmaddwd. 16 channels at a time, so that whole lines are read.
template <int R>
static inline void dot_pair(int64_t groups, const uint8_t* A, int64_t a_step, const int8_t* B, int32_t* sums,
                            bool accumulate) {
  __m256i c[R][4];
  for (auto& row : c)
    for (auto& v : row) v = _mm256_setzero_si256();
  for (int64_t g = 0; g < groups; g++, A += a_step, B += BLOCK_GROUP) {
    __builtin_prefetch(B + OWN_BLOCK_AHEAD);
    __m256i b[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) b[i] = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)(B + 16 * i)));
#pragma GCC unroll 2
    for (int r = 0; r < R; r++) {
      const __m256i x = _mm256_broadcastq_epi64(_mm_cvtepu8_epi16(_mm_loadu_si32(A + 4 * r)));
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) c[r][i] = _mm256_add_epi32(c[r][i], _mm256_madd_epi16(x, b[i]));
    }
  }
  for (int r = 0; r < R; r++)
    for (int i = 0; i < 4; i += 2) {  // pairs of a channel meet; hadd leaves the quarters as 0 2 1 3
      __m256i* s = (__m256i*)(sums + r * BLOCK + 4 * i);
      __m256i v = _mm256_permute4x64_epi64(_mm256_hadd_epi32(c[r][i], c[r][i + 1]), 0xd8);
      _mm256_storeu_si256(s, accumulate ? _mm256_add_epi32(v, _mm256_loadu_si256(s)) : v);
    }
}
static inline void dot_block(int rows, int64_t groups, const uint8_t* A, const int8_t* B, int32_t* sums,
                             bool accumulate, Ahead, const char*, int64_t) {
  for (int h = 0; h < 2; h++) {
    const int8_t* b = B + 64 * h;
    int r = 0;
    for (; r + 2 <= rows; r += 2) dot_pair<2>(groups, A + 4 * r, 4 * rows, b, sums + r * BLOCK + 16 * h, accumulate);
    if (r < rows) dot_pair<1>(groups, A + 4 * r, 4 * rows, b, sums + r * BLOCK + 16 * h, accumulate);
  }
}

#else

// Plain loops that compilers turn into vectors of whatever the machine has.
static inline void dot_block(int rows, int64_t groups, const uint8_t* A, const int8_t* B, int32_t* sums,
                             bool accumulate, Ahead, const char*, int64_t) {
  for (int r = 0; r < rows; r++) {
    int32_t c[BLOCK] = {};
    for (int64_t g = 0; g < groups; g++) {
      const uint8_t* a = A + (g * rows + r) * 4;
      const int8_t* b = B + g * BLOCK_GROUP;
      for (int i = 0; i < BLOCK; i++)
        c[i] += a[0] * b[4 * i] + a[1] * b[4 * i + 1] + a[2] * b[4 * i + 2] + a[3] * b[4 * i + 3];
    }
    for (int i = 0; i < BLOCK; i++) sums[r * BLOCK + i] = c[i] + (accumulate ? sums[r * BLOCK + i] : 0);
  }
}

#endif

static inline simd::vec compensated(const int32_t* sums, int32_t zero, const int32_t* weight_sums) {
  alignas(64) float f[simd::W];
  for (int i = 0; i < simd::W; i++)
    f[i] = (float)(int32_t)((uint32_t)sums[i] - (uint32_t)zero * (uint32_t)weight_sums[i]);
  return simd::load(f);
}

#endif

#if defined(LIMBER_ISA_AMX)

// 16 or 32 rows on AMX tiles: A [step][16 * HALVES][64], B's tiles where they lie.
template <int HALVES>
static __attribute__((noinline)) void tile_dot(int64_t steps, const uint8_t* A, const int8_t* B, int32_t* sums,
                                               bool accumulate, const char* ahead, int64_t ahead_step) {
  constexpr int64_t ROW = BLOCK * sizeof(int32_t), HALF = TILE_ROWS * BLOCK;
  asm volatile("" ::: "memory");  // the loads below do not tell the compiler that they read memory
  if (accumulate) {
    _tile_loadd(0, sums, ROW);
    _tile_loadd(1, sums + 16, ROW);
    if (HALVES == 2) {
      _tile_loadd(2, sums + HALF, ROW);
      _tile_loadd(3, sums + HALF + 16, ROW);
    }
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t s = 0; s < steps; s++, A += HALVES * 1024, B += 16 * BLOCK_GROUP) {
    for (int64_t line = 0; line < ahead_step; line += 64) _mm_prefetch(ahead + line, _MM_HINT_T1);
    ahead += ahead_step;
    _tile_loadd(4, A, 64);
    _tile_loadd(6, B, BLOCK_GROUP);
    _tile_loadd(7, B + 64, BLOCK_GROUP);
    _tile_dpbusd(0, 4, 6);
    _tile_dpbusd(1, 4, 7);
    if (HALVES == 2) {
      _tile_loadd(5, A + 1024, 64);
      _tile_dpbusd(2, 5, 6);
      _tile_dpbusd(3, 5, 7);
    }
  }
  _tile_stored(0, sums, ROW);
  _tile_stored(1, sums + 16, ROW);
  if (HALVES == 2) {
    _tile_stored(2, sums + HALF, ROW);
    _tile_stored(3, sums + HALF + 16, ROW);
  }
}

#endif

}  // namespace limber
