// What the forward and the backward of project_concat share: rows anywhere in memory, and products of packed blocks.
//
// Letters: rows = n_images k soft prompts, D features, E columns of the embedding. A 'strip' is MR rows of a block of
// C, summed in fp32; its A stays in L1, part by part of k, while a block of B streams from L2.
#pragma once
#include <omp.h>

#include <atomic>
#include <cmath>
#include <cstring>

#include "../params/project_concat.h"
#include "dropout.h"
#include "tile_gemm.h"

namespace limber {

template <class Op>
struct ProjectBlocks {
  static constexpr int MR = Op::MR;
  static constexpr int COLUMNS = 192;         // widest block of C; 128 and 256 are slower on AMX
  static constexpr int LDC = COLUMNS + 16;    // keeps the rows of a strip out of each other's L1 sets
  static constexpr int TALL = 192 / MR * MR;  // rows of a block of the weight's gradient
  static constexpr int PART = Op::PARTS == 1 ? 128 : 64 * Op::PARTS;  // dwords of k
  // What a packed block of B may take of L2: 2 MiB on machines with AMX, 1 MiB and less elsewhere.
  static constexpr int64_t B_BYTES = Op::TILES ? 9 << 17 : 1 << 19;
  static constexpr int64_t K_ROWS = 1280;  // rows that the weight's gradient sums before its next block of rows
  // Columns of a block of B with `k` dwords: what fits, evenly split, and two blocks a thread where there are enough.
  static int64_t columns(int64_t n, int64_t k, int threads) {
    const int64_t fit = std::clamp<int64_t>(B_BYTES / (4 * std::max<int64_t>(k, 1)), NR, COLUMNS) / NR * NR;
    const int64_t shared = std::max<int64_t>(round_up(ceil_div(n, 2 * threads), NR), NR), most = std::min(fit, shared);
    return round_up(ceil_div(n, ceil_div(n, most)), NR);
  }
};

// Scratch of all threads. Large ones start on huge pages: 4 KiB pages do not spread over the sets of L2 evenly, and a
// block of B of 1.1 MiB then loses 10% of the rate.
inline Buffer<float> scratch_floats(int64_t n) {
  return Buffer<float>(n < 1 << 18 ? n : std::max<int64_t>(n, 1 << 20));
}

// The next `bytes` of a stream from L3 are wanted in a while. One line of eight is enough for the processor's own
// prefetcher to run along: 1.68 instead of 1.41 TFLOP/s on AMX; every line takes the tiles' buffers, and gives 1.52.
inline void stream_ahead(const float* next, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 512) __builtin_prefetch((const char*)next + i, 0, 2);
}

// C[R x nb] = A B over k dwords: A, a packed panel, streams from L3, B's panels lie in L2, `panel` dwords apart.
template <class Op>
static void multiply_strip(float* C, int64_t ldc, int R, int64_t k, const float* A, const float* B, int64_t panel,
                           int64_t nb) {
  constexpr int64_t PART = ProjectBlocks<Op>::PART;
  const int64_t share = 4 * PART * Op::MR / (nb / NR);
  for (int64_t at = 0; at < k; at += PART)
    for (int64_t j = 0; j < nb; j += NR) {
      stream_ahead(A + (at + PART) * Op::MR + j / NR * share / 4, share);
      gemm_tile<Op, 1, Op::MR>(R, std::min(PART, k - at), A + at * Op::MR, B + j / NR * panel + at * NR, C + j, ldc, NR,
                               at > 0);
    }
}

// 2 W elements of a row from column d on, bf16 in whole cache lines. `past_caches` is for outputs that no cache keeps:
// reading their lines first costs 10% of the backward at CLIP's shape. It ends with end_stores.
inline void store_two(Dtype t, void* row, int64_t d, simd::vec lo, simd::vec hi, int64_t left,
                      [[maybe_unused]] bool past_caches = false) {
#if defined(LIMBER_BF16_PAIRS)
  if (t == Dtype::bf16 && left >= NR) {
    float* to = (float*)((uint16_t*)row + d);
    const simd::vec pairs = simd::round_pairs(lo, hi);
    return past_caches && (uintptr_t)to % 64 == 0 ? simd::stream(to, pairs) : simd::storeu(to, pairs);
  }
#endif
  store_from_float(t, row, d, lo, left);
  store_from_float(t, row, d + simd::W, hi, left - simd::W);
}
inline void end_stores() {
#if defined(LIMBER_BF16_PAIRS)
  simd::stream_end();
#endif
}

// Rows at any places in memory, as the packing routines read them; with a mask its zeros are multiplied in.
struct PlacedRows {
  const void* base;
  const int64_t* offset;  // [count] elements
  int64_t count, D;
  Dtype dtype;
  const Dropout* dropout = nullptr;

  const void* row(int64_t i) const { return (const char*)base + offset[i] * size_of(dtype); }

  template <class Op>
  Dwords<Op> load(int64_t i, int64_t end, int64_t d) const {
    if (i >= end) return {};
    if (!dropout) return load_dwords<Op>(dtype, row(i), d, D - d);
    simd::vec v[Op::P];
    floats<Op>(i, d, v);
    return to_dwords<Op>(v);
  }
  // The Op::P W elements from column d on, as floats.
  template <class Op>
  void floats(int64_t i, int64_t d, simd::vec* v) const {
    load_floats<Op>(dtype, row(i), d, D - d, v);
    if (!dropout) return;
    alignas(64) float keep[Op::P * simd::W];
    dropout->factors<Op::P * simd::W>(dropout->key(i), d, 1.f, keep);
    for (int h = 0; h < Op::P; h++) v[h] = simd::mul(v[h], simd::load(keep + h * simd::W));
  }
};

// Whether all sums of several parts' products are finite. An infinity has no parts: where one is among the inputs its
// sums are NaN or infinite, and only the arithmetic of F32 tells which.
template <class Op>
class Finite {
 public:
  void see(const float* sums, int64_t n) {
    if constexpr (Op::PARTS > 1) {
      simd::vec none = simd::zero();
      for (int64_t j = 0; j < n; j += simd::W) none = simd::fma(simd::load(sums + j), simd::zero(), none);
      if (simd::sum(none) != 0.f) all_.store(false, std::memory_order_relaxed);
    }
  }
  operator bool() const { return all_.load(std::memory_order_relaxed); }

 private:
  std::atomic<bool> all_{true};
};

inline int64_t prompt_rows(const ProjectConcatParams& p) { return p.n_images * p.k; }

inline Buffer<int64_t> feature_offsets(const ProjectConcatParams& p) {
  Buffer<int64_t> offset(prompt_rows(p));
  for (int64_t i = 0, r = 0; i < p.n_images; i++)
    for (int64_t j = 0; j < p.k; j++, r++) offset[r] = i * p.image_stride + j * p.row_stride;
  return offset;
}

inline Rows weight_rows(const ProjectConcatParams& p) {
  return {p.weight, nullptr, p.weight_stride, 0, p.E, p.E, p.D, p.dtype};
}

// Mean and 1 / standard deviation of a row, in two passes.
struct RowMoments {
  float mean, rstd;
  RowMoments(Dtype t, const void* row, int64_t n, double eps) {
    simd::vec s = simd::zero();
    for (int64_t e = 0; e < n; e += simd::W) s = simd::add(s, load_as_float(t, row, e, n - e));
    mean = simd::sum(s) / (float)n;
    const simd::vec m = simd::set1(mean);
    s = simd::zero();
    for (int64_t e = 0; e < n; e += simd::W) {
      const simd::vec x = simd::select(simd::first(n - e), simd::sub(load_as_float(t, row, e, n - e), m), simd::zero());
      s = simd::fma(x, x, s);
    }
    rstd = (float)(1 / std::sqrt((double)(simd::sum(s) / (float)n) + eps));
  }
};

}  // namespace limber
