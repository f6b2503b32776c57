// What this machine can do at most, measured: the denominators of every speed-of-light fraction.
#pragma once
#include <chrono>

#include "tile_gemm.h"

namespace limber {

inline double seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

enum PeakKind { PEAK_FP32, PEAK_BF16, PEAK_INT8 };

// FLOP/s of one thread on independent multiply-adds held in registers: 24 chains hide any latency. Inline assembly on
// x86, because compilers spill accumulator arrays and then measure half the peak.
template <PeakKind KIND>
__attribute__((noinline)) double peak_run(int64_t iterations) {
  const double start = seconds();
#if defined(LIMBER_BF16_PAIRS)
#define LIMBER_OP(i) "vfmadd231ps %%zmm30, %%zmm31, %%zmm" #i "\n\t"
#define LIMBER_DOT(i) "vdpbf16ps %%zmm30, %%zmm31, %%zmm" #i "\n\t"
#define LIMBER_BYTES(i) "vpdpbusd %%zmm30, %%zmm31, %%zmm" #i "\n\t"
#define LIMBER_24(F) \
  F(0)               \
  F(1)               \
  F(2)               \
  F(3) F(4) F(5) F(6) F(7) F(8) F(9) F(10) F(11) F(12) F(13) F(14) F(15) F(16) F(17) F(18) F(19) F(20) F(21) F(22) F(23)
#define LIMBER_CLOBBER                                                                                                \
  "zmm0", "zmm1", "zmm2", "zmm3", "zmm4", "zmm5", "zmm6", "zmm7", "zmm8", "zmm9", "zmm10", "zmm11", "zmm12", "zmm13", \
      "zmm14", "zmm15", "zmm16", "zmm17", "zmm18", "zmm19", "zmm20", "zmm21", "zmm22", "zmm23", "zmm30", "zmm31", "cc"
  constexpr double flop = 24 * (KIND == PEAK_INT8 ? 128 : KIND == PEAK_BF16 ? 64 : 32);
  asm volatile("vpxorq %%zmm30, %%zmm30, %%zmm30\n\tvpxorq %%zmm31, %%zmm31, %%zmm31" ::: "zmm30", "zmm31");
  for (int64_t k = 0; k < iterations; k++) {
    if (KIND == PEAK_INT8)
      asm volatile(LIMBER_24(LIMBER_BYTES)::: LIMBER_CLOBBER);
    else if (KIND == PEAK_BF16)
      asm volatile(LIMBER_24(LIMBER_DOT)::: LIMBER_CLOBBER);
    else
      asm volatile(LIMBER_24(LIMBER_OP)::: LIMBER_CLOBBER);
  }
#elif defined(LIMBER_ISA_AVX2)
#define LIMBER_OP(i) "vfmadd231ps %%ymm14, %%ymm15, %%ymm" #i "\n\t"
#define LIMBER_12(F) F(0) F(1) F(2) F(3) F(4) F(5) F(6) F(7) F(8) F(9) F(10) F(11)
  constexpr double flop = 24 * 16;
  for (int64_t k = 0; k < iterations; k++)
    asm volatile(LIMBER_12(LIMBER_OP) LIMBER_12(LIMBER_OP)::
                     : "ymm0", "ymm1", "ymm2", "ymm3", "ymm4", "ymm5", "ymm6", "ymm7", "ymm8", "ymm9", "ymm10", "ymm11",
                       "cc");
#else
  constexpr int CHAINS = 12;  // multiply and add are two operations of 3-4 cycles, two of each a cycle
  constexpr double flop = CHAINS * 2 * simd::W;
  simd::vec c[CHAINS], x = simd::set1(0.5f), y = simd::set1(0.25f);
  for (auto& v : c) v = simd::set1(1.f);
  for (int64_t k = 0; k < iterations; k++)
#pragma GCC unroll 12
    for (int i = 0; i < CHAINS; i++) c[i] = simd::fma(c[i], x, y);
  simd::vec total = simd::zero();
  for (auto& v : c) total = simd::add(total, v);
  volatile float sink = simd::sum(total);
  (void)sink;
#endif
  return iterations * flop / (seconds() - start);
}

#if defined(LIMBER_ISA_AMX)
template <PeakKind KIND>
inline double tile_peak(int64_t iterations) {
  const TileSession session;
  const double start = seconds();
  for (int64_t k = 0; k < iterations; k++) {
    if (KIND == PEAK_INT8) {
      _tile_dpbusd(0, 4, 6);
      _tile_dpbusd(1, 4, 7);
      _tile_dpbusd(2, 5, 6);
      _tile_dpbusd(3, 5, 7);
    } else {
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  return iterations * 4.0 * 16 * 16 * (KIND == PEAK_INT8 ? 64 : 32) * 2 / (seconds() - start);
}
#endif

struct Peaks {
  double fp32, bf16, int8;
};

// Per-thread peaks with `threads` of them busy; bf16 and int8 are 0 where the instruction set has no such product.
inline Peaks cpu_peaks(int threads) {
  double fp32 = 0, bf16 = 0, int8 = 0;
  for (int rep = 0; rep < 5; rep++) {
    double f = 0, b = 0, i = 0;
#pragma omp parallel num_threads(threads) reduction(+ : f, b, i)
    {
      f += peak_run<PEAK_FP32>(100000);
#if defined(LIMBER_ISA_AMX)
      b += tile_peak<PEAK_BF16>(100000), i += tile_peak<PEAK_INT8>(100000);
#elif defined(LIMBER_ISA_AVX512)
      b += peak_run<PEAK_BF16>(100000), i += peak_run<PEAK_INT8>(100000);
#endif
    }
    fp32 = std::max(fp32, f / threads), bf16 = std::max(bf16, b / threads), int8 = std::max(int8, i / threads);
  }
  return {fp32, bf16, int8};
}

// Bytes/s of reading a buffer much larger than the caches, best of a few sweeps.
inline double read_bandwidth(int threads, int64_t bytes) {
  Buffer<float> data(bytes / 4);
  double best = 0;
  float sink = 0;
  const int64_t n = bytes / 4 / (8 * simd::W);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t k = 0; k < n * 8 * simd::W; k++) data[k] = 1.f;
  for (int rep = 0; rep < 6; rep++) {
    const double start = seconds();
#pragma omp parallel for num_threads(threads) schedule(static) reduction(+ : sink)
    for (int64_t k = 0; k < n; k++) {
      const float* p = data + k * 8 * simd::W;
      for (int i = 0; i < 8 * simd::W; i += 16) __builtin_prefetch(p + 1024 + i);
      simd::vec s[2] = {simd::load(p), simd::load(p + simd::W)};
      for (int i = 2; i < 8; i++) s[i % 2] = simd::add(s[i % 2], simd::load(p + i * simd::W));
      simd::vec t = simd::add(s[0], s[1]);
      float lane[simd::W];
      simd::storeu(lane, t);
      sink += lane[0];
    }
    best = std::max(best, n * 8 * simd::W * 4 / (seconds() - start));
  }
  volatile float keep = sink;
  (void)keep;
  return best;
}

}  // namespace limber
