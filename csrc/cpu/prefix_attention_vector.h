// Attention of a few rows: every row in turn over blocks of keys and values that stay in L1 or L2 for the next row.
#pragma once
#include "prefix_attention_common.h"

namespace limber {

// Op: of the dot products; DTYPE: of q; PAGES: of keys and values.
template <class Op, Dtype DTYPE, Dtype PAGES>
class VectorAttention {
  static constexpr bool SCALED = PAGES == Dtype::i8;
  static constexpr int W = simd::W, KEYS = 64;
  static constexpr int AHEAD =
      SCALED ? 32 : 16;  // tokens between a row and the one that is fetched from memory meanwhile
  static_assert(KEYS % W == 0, "whole vectors of keys");

 public:
  explicit VectorAttention(const PrefixAttentionParams& params) : p(params), factor_(p.scale * (float)LOG2E) {}

  // Rows q[0 .. R-1] of a head over tokens, of which row r sees those below limit[r].
  void run(const void* const* q, const float* limit, int R, const Tokens& tokens, const Tokens* next,
           float* const* parts) {
    for (int r = 0; r < R; r++) PartSums{parts[r], p.D}.maximum() = -INFINITY;
    const int64_t total = tokens.count(), begin = tokens.begin;
    tokens.gather(keys_, AHEAD + W, next);  // the last W may also be multiplied in vain
    value_ = tokens.value_offset();
    if (SCALED) scales_.gather(tokens, W, next);
    for (int64_t at = 0; at < total; at += KEYS) {
      const int n = (int)std::min<int64_t>(KEYS, total - at);
      for (int r = 0; r < R; r++) {
        const int seen = (int)std::min<float>(n, limit[r] - begin - at);
        if (seen > 0) block(q[r], seen, at, PartSums{parts[r], p.D});
      }
    }
  }

 private:
  void block(const void* q, int n, int64_t at, PartSums part) {
    const char* const* keys = keys_.data() + at;
    simd::vec top = simd::set1(-INFINITY);
    for (int j = 0; j < n; j += W) {
      simd::vec x = dots(q, keys + j);
      if (SCALED) x = simd::mul(x, simd::loadu(scales_.keys.data() + at + j));
      x = simd::select(simd::first(n - j), x, simd::set1(-INFINITY));
      simd::store(x_ + j, x);
      top = simd::max(top, x);
    }
    const bool fresh = part.maximum() == -INFINITY;
    const float maximum = fresh ? simd::hmax(top) : std::max(part.maximum(), simd::hmax(top));
    const simd::vec base = finite_base(simd::set1(maximum));
    simd::vec sum = simd::zero();
    for (int j = 0; j < n; j += W) {
      const simd::vec e = weight<6>(simd::load(x_ + j), base, simd::set1(factor_));
      simd::store(x_ + j, SCALED ? simd::mul(e, simd::loadu(scales_.values.data() + at + j)) : e);
      sum = simd::add(sum, e);
    }
    const float keep = fresh ? 0.f : exp2f(factor_ * (part.maximum() - maximum));
    part.sum() = (fresh ? 0.f : part.sum() * keep) + simd::sum(sum);
    part.maximum() = maximum;
    constexpr int MOST = W == 16 ? 16 : 8;
    int64_t d = 0;
    for (; d + MOST * W <= p.D; d += MOST * W) columns<MOST>(d, n, keys, part.base, fresh, keep);
    for (; d + 2 * W <= p.D; d += 2 * W) columns<2>(d, n, keys, part.base, fresh, keep);
    for (; d < p.D; d += W) columns<1>(d, n, keys, part.base, fresh, keep);
  }

  // <q, key> of W keys.
  simd::vec dots(const void* q, const char* const* keys) const {
    simd::vec v[W];
#pragma GCC unroll 16
    for (int i = 0; i < W; i++) v[i] = simd::zero();
    for (int64_t d = 0; d < p.D; d += Op::P * W) {
      const simd::vec f = load_dwords<Op>(DTYPE, q, d, p.D - d).part[0];
#pragma GCC unroll 16
      for (int i = 0; i < W; i++) {
        v[i] = Op::madd(v[i], load_page<Op, PAGES>(keys[i], d, p.D - d).part[0], f);
        if (!SCALED || d % 64 == 0) __builtin_prefetch(keys[i + AHEAD] + d * size_of(PAGES), 0, 2);
      }
    }
    simd::transpose(v);
    for (int step = 1; step < W; step *= 2)
      for (int i = 0; i < W; i += 2 * step) v[i] = simd::add(v[i], v[i + step]);
    return v[0];
  }

  // Columns d .. d + C W - 1 of keep * sums + weights V.
  template <int C>
  void columns(int64_t d, int n, const char* const* keys, float* sums, bool fresh, float keep) const {
    simd::vec v[C];
#pragma GCC unroll 16
    for (int c = 0; c < C; c++) v[c] = fresh ? simd::zero() : simd::mul(simd::load(sums + d + c * W), simd::set1(keep));
    for (int j = 0; j < n; j++) {
      const simd::vec e = simd::set1(x_[j]);
      const char* value = keys[j] + value_;
      prefetch_row(keys[j + AHEAD] + value_ + d * size_of(PAGES), C * W * size_of(PAGES));
#pragma GCC unroll 16
      for (int c = 0; c < C; c++) v[c] = simd::fma(e, load_page<F32, PAGES>(value, d + c * W, W).part[0], v[c]);
    }
#pragma GCC unroll 16
    for (int c = 0; c < C; c++) simd::store(sums + d + c * W, v[c]);
  }

  const PrefixAttentionParams& p;
  const float factor_;
  std::vector<const char*> keys_;
  Scales scales_;
  int64_t value_ = 0;
  alignas(64) float x_[KEYS];
};

}  // namespace limber
