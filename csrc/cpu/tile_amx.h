// Products on AMX tiles: C[32 x 32] (+)= A B, four accumulator tiles, two of A and two of B.
//
// Both operands are streams of 2 KiB per part of a step of k (32 bf16 values, 16 dwords):
//   A panel [step][part][2 halves][16 rows][16 dwords]   32 rows of a row-major matrix
//   B panel [step][part][16 k dwords][32 columns]        with one part the packed panel of tile_gemm.h's register tiles
// A value is the sum of its parts (rows.h: Split); bf16 values have one.
// A step is 64 cycles of products on 64 cache lines. On Granite Rapids (3.8 TFLOP/s a core) it reaches 65-70% of the
// peak with A in L1 and B in L2, 57% with both in L2, 23-35% from L3; prefetching B by hand changes nothing.
#pragma once
#if defined(LIMBER_ISA_AMX)
#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace limber {

constexpr int TILE_ROWS = 16, STEP = 2 * 16 * 16;  // rows of a tile; dwords of a panel's step

// A thread's tile configuration, all tiles 16 x 64 bytes, for as long as it multiplies.
class TileSession {
 public:
  TileSession() {
    alignas(64) static constexpr Config config;
    _tile_loadconfig(&config);
  }
  TileSession(const TileSession&) = delete;
  ~TileSession() { _tile_release(); }

 private:
  struct Config {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  };
};

static inline __attribute__((always_inline)) void tile_multiply() {
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 4, 7);
  _tile_dpbf16ps(2, 5, 6);
  _tile_dpbf16ps(3, 5, 7);
}

// Products of parts p of A and q of B with p + q < PARTS, one of the two loaded anew for each. With three parts 24
// products stand against 14 loads: on Granite Rapids 80% of the peak, A in L1 and B in L2, in runs of four steps (70%
// in runs of eight, whose A does not stay in L1).
template <bool ACCUMULATE, int PARTS>
static __attribute__((noinline)) void tile_product(int64_t steps, const float* A, const float* B, float* C,
                                                   int64_t ldc) {
  const int64_t bytes = ldc * (int64_t)sizeof(float);
  float* low = C + TILE_ROWS * ldc;
  asm volatile("" ::: "memory");  // the loads below do not tell the compiler that they read memory
  if (ACCUMULATE) {
    _tile_loadd(0, C, bytes);
    _tile_loadd(1, C + 16, bytes);
    _tile_loadd(2, low, bytes);
    _tile_loadd(3, low + 16, bytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  auto load_a = [&](int p) {
    _tile_loadd(4, A + p * STEP, 64);
    _tile_loadd(5, A + p * STEP + STEP / 2, 64);
  };
  auto load_b = [&](int q) {
    _tile_loadd(6, B + q * STEP, 128);
    _tile_loadd(7, B + q * STEP + 16, 128);
  };
  for (int64_t s = 0; s < steps; s++, A += PARTS * STEP, B += PARTS * STEP) {
    load_a(0), load_b(PARTS - 1);
    tile_multiply();
    if (PARTS == 3) {
      load_b(1);
      tile_multiply();
      load_a(1);
      tile_multiply();
      load_b(0);
      tile_multiply();
      load_a(0);
      tile_multiply();
      load_a(2);
      tile_multiply();
    } else if (PARTS == 2) {
      load_b(0);
      tile_multiply();
      load_a(1);
      tile_multiply();
    }
  }
  _tile_stored(0, C, bytes);
  _tile_stored(1, C + 16, bytes);
  _tile_stored(2, low, bytes);
  _tile_stored(3, low + 16, bytes);
}

// C[R x min(cols, 32)] = A B, or += with accumulate; k in dwords, a multiple of 16 PARTS. A ragged edge goes through a
// private tile by the same operations: equal rows give equal results wherever they lie.
template <int PARTS>
static inline void tile_gemm(int R, int64_t k, const float* A, const float* B, float* C, int64_t ldc, int64_t cols,
                             bool accumulate) {
  const int64_t steps = k / (16 * PARTS);
  if (R == 32 && cols >= 32)
    return accumulate ? tile_product<true, PARTS>(steps, A, B, C, ldc)
                      : tile_product<false, PARTS>(steps, A, B, C, ldc);
  alignas(64) float edge[32 * 32] = {};
  const size_t bytes = (cols < 32 ? cols : 32) * sizeof(float);
  for (int r = 0; accumulate && r < R; r++) std::memcpy(edge + 32 * r, C + r * ldc, bytes);
  tile_product<true, PARTS>(steps, A, B, edge, 32);
  for (int r = 0; r < R; r++) std::memcpy(C + r * ldc, edge + 32 * r, bytes);
}

// out[32 x 16] = A B for 32 rows of A in memory, `stride` bytes apart, and one panel of B, [k dword][16 columns]: A is
// read once, unpacked. A line of every eight ahead of time lets the processor's prefetcher follow 32 rows: 5%.
[[maybe_unused]] static __attribute__((noinline)) void tile_few(int64_t steps, const char* A, int64_t stride,
                                                                const float* B, float* out) {
  asm volatile("" ::: "memory");
  _tile_zero(0);
  _tile_zero(1);
  for (int64_t s = 0; s < steps; s++, A += 64, B += STEP / 2) {
    const char* ahead = A + (s % 8 * 4) * stride + (8 - s % 8) * 64;
    for (int i = 0; i < 4; i++) __builtin_prefetch(ahead + i * stride, 0, 2);
    _tile_loadd(6, B, 64);
    _tile_loadd(4, A, stride);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, A + TILE_ROWS * stride, stride);
    _tile_dpbf16ps(1, 5, 6);
  }
  _tile_stored(0, out, 64);
  _tile_stored(1, out + STEP / 2, 64);
}

}  // namespace limber
#endif
