// Rows of a matrix in memory, read as fp32 or as bf16 pairs: dtype conversion, optional row scale (fused L2
// normalisation), zero padding.
#pragma once
#include <cmath>

#include "../params/dtype.h"
#include "buffer.h"
#include "simd.h"
#include "tile_amx.h"

namespace limber {

// What a register-tile product multiplies. A 'dword' is its unit along k: one float, or two bf16 neighbours (P values).
struct F32 {
  static constexpr int P = 1, PARTS = 1, EXP2_DEGREE = 6;  // 2e-9
  static constexpr int MR = simd::MR, K_STEP = 1;          // rows of a register tile; dwords that k is padded to
  static constexpr bool FP32 = true;                       // to fp32's accuracy; what lies between two products is fp32
  static constexpr bool TILES = false;                     // the register tile is made of vectors, not of AMX tiles
  struct Session {};                                       // what a thread holds while it multiplies
  static simd::vec madd(simd::vec c, simd::vec a, simd::vec b) { return simd::fma(a, b, c); }
};
#if defined(LIMBER_BF16_PAIRS)
struct BF16 {
  static constexpr int P = 2, PARTS = 1, EXP2_DEGREE = 4;  // 3e-6, a thousandth of bf16's own step
  static constexpr bool FP32 = false;
#if defined(LIMBER_ISA_AMX)
  static constexpr int MR = 32, K_STEP = 16;  // tile_amx.h
  static constexpr bool TILES = true;
  using Session = TileSession;
#else
  static constexpr int MR = simd::MR, K_STEP = 1;
  static constexpr bool TILES = false;
  struct Session {};
#endif
  static simd::vec madd(simd::vec c, simd::vec a, simd::vec b) { return simd::dot_pairs(c, a, b); }
};
#endif
#if defined(LIMBER_ISA_AMX)
// fp32 on AMX tiles, which multiply bf16 alone: a value is the sum of N bf16 values, and a product of two is the
// products of their parts but for the smallest: 6 of 9 for fp32 (N = 3, error 2^-25), 3 of 4 for fp16 (N = 2, 2^-17).
// At 3.85 TFLOP/s a core six products still are 2.6 times the rate of fp32 multiply-adds, and since a tile instruction
// rounds its accumulator once for 32 values of k, sums are more exact than theirs. (The same idea: Henry, Tang,
// Heinecke, "Leveraging the bfloat16 Artificial Intelligence Datatype For Higher-Precision Computations", ARITH 2019.)
template <int N>
struct Split {
  static constexpr int P = 2, PARTS = N, EXP2_DEGREE = 6, MR = 32, K_STEP = 16;
  static constexpr bool FP32 = true, TILES = true;
  using Session = TileSession;
};
template <class F>
auto with_split(Dtype dtype, F f) {
  return dtype == Dtype::f32 ? f(Split<3>{}) : f(Split<2>{});
}
#endif

#if defined(LIMBER_BF16_PAIRS)
// Whether bf16 products are faster than fp32 ones. AMX tiles are; Intel's dot products in vectors are not: 85 GFLOP/s a
// core against 173 by fp32 multiply-adds, on a Xeon whose AMX its hypervisor hides.
inline bool pairs_pay() {
#if defined(LIMBER_ISA_AMX)
  return true;
#else
  static const bool intel = (__builtin_cpu_init(), __builtin_cpu_is("intel"));
  return !intel;
#endif
}
#endif

// bf16 products run natively where the machine is faster at them; all else is widened to fp32 when packed.
template <class F>
auto with_arithmetic([[maybe_unused]] Dtype dtype, F f) {
#if defined(LIMBER_BF16_PAIRS)
  if (dtype == Dtype::bf16 && pairs_pay()) return f(BF16{});
#endif
  return f(F32{});
}

// Dwords that `n` neighbours along k take in a packed operand. With several parts each step of k holds them in order.
template <class Op>
constexpr int64_t dwords(int64_t n) {
  return round_up(ceil_div(n, Op::P), Op::K_STEP) * Op::PARTS;
}
// W dwords of each part.
template <class Op>
struct Dwords {
  simd::vec part[Op::PARTS];
};
// From P W floats.
template <class Op>
Dwords<Op> to_dwords(const simd::vec* v) {
  if constexpr (Op::P == 1) return {v[0]};
#if defined(LIMBER_ISA_AMX)
  else if constexpr (Op::PARTS > 1) {
    Dwords<Op> out;
    simd::split_pairs<Op::PARTS>(v[0], v[1], out.part);
    return out;
  }
#endif
#if defined(LIMBER_BF16_PAIRS)
  else
    return {simd::round_pairs(v[0], v[1])};
#endif
}

inline int64_t size_of(Dtype t) { return t == Dtype::f32 ? 4 : t == Dtype::i8 ? 1 : 2; }

inline simd::vec load_as_float(Dtype t, const void* p, int64_t d, int64_t left) {
  if (t == Dtype::f32) return simd::load_first((const float*)p + d, left);
  return t == Dtype::bf16 ? simd::load_bf16((const uint16_t*)p + d, left)
                          : simd::load_f16((const uint16_t*)p + d, left);
}
inline void store_from_float(Dtype t, void* p, int64_t d, simd::vec v, int64_t left) {
  if (t == Dtype::f32)
    simd::store_first((float*)p + d, v, left);
  else if (t == Dtype::bf16)
    simd::store_bf16((uint16_t*)p + d, v, left);
  else
    simd::store_f16((uint16_t*)p + d, v, left);
}

// P W features of a row from feature d on, `left` features before its end, as floats; zeros beyond.
template <class Op>
void load_floats(Dtype t, const void* row, int64_t d, int64_t left, simd::vec* v) {
  for (int h = 0; h < Op::P; h++) v[h] = load_as_float(t, row, d + h * simd::W, left - h * simd::W);
}
// The same as dwords.
template <class Op>
Dwords<Op> load_dwords([[maybe_unused]] Dtype t, const void* row, int64_t d, int64_t left) {
#if defined(LIMBER_BF16_PAIRS)
  if constexpr (!Op::FP32) return {simd::load_pairs((const uint16_t*)row + d, left)};
#endif
  simd::vec v[Op::P];
  load_floats<Op>(t, row, d, left, v);
  return to_dwords<Op>(v);
}

// Rows 0 .. split-1 of one matrix followed by those of another (the text tower and its extra negatives).
struct Rows {
  const void *base, *more;
  int64_t stride, more_stride, split, count, D;
  Dtype dtype;
  const float* norm = nullptr;  // [count] divisors, or null: rows as they are

  const void* row(int64_t i) const {
    return i < split ? (const char*)base + i * stride * size_of(dtype)
                     : (const char*)more + (i - split) * more_stride * size_of(dtype);
  }
  // W dwords of row i from feature d on; zeros past the row's end, past `count` and past `end`.
  template <class Op>
  Dwords<Op> load(int64_t i, int64_t end, int64_t d) const {
    if (i >= end) return {};
    if (!norm) return load_dwords<Op>(dtype, row(i), d, D - d);
    const simd::vec divisor = simd::set1(norm[i]);
    simd::vec v[Op::P];
    load_floats<Op>(dtype, row(i), d, D - d, v);
    for (auto& x : v) x = simd::div(x, divisor);
    return to_dwords<Op>(v);
  }
  // max(||row||, eps), as torch.nn.functional.normalize
  static constexpr float EPS = 1e-12f;
  float norm_of(int64_t i) const {
    simd::vec s = simd::zero();
    const void* p = row(i);
    for (int64_t d = 0; d < D; d += simd::W) {
      simd::vec v = load_as_float(dtype, p, d, D - d);
      s = simd::fma(v, v, s);
    }
    const float n = std::sqrt(simd::sum(s));
    return n < EPS ? EPS : n;  // NaN stays
  }
};

}  // namespace limber
