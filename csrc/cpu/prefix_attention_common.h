// What the two ways of attention share: where tokens lie, new tokens on their way into the pages, sums of parts.
//
// A logit is <q, k>; its weight 2^(factor (logit - largest)), factor = scale log2(e). A part of a row's tokens leaves
// its largest logit, the sum of its weights and the weights times V; parts merge by their maxima. A part without tokens
// has the maximum -inf.
#pragma once
#include <omp.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "../params/prefix_attention.h"
#include "exp2.h"
#include "tile_gemm.h"

namespace limber {

constexpr int64_t MAX_HEAD_DIM = 256;

// Where the keys and values of a head's tokens lie: a value so many bytes after its key.
struct Tokens {
  const PrefixAttentionParams& p;
  const int32_t* table;
  int64_t head, begin, end;

  int64_t count() const { return end - begin; }
  int64_t row_bytes() const { return p.D * size_of(p.page_dtype); }
  int64_t value_offset() const { return p.page_size * row_bytes(); }
  // Calls f(page, place of the first, number) for the tokens of every page, of at most `most`; then how many they are.
  template <class F>
  int64_t pages(int64_t most, F f) const {
    const int64_t end = std::min(this->end, begin + most);
    for (int64_t t = begin; t < end;) {
      const int64_t slot = t % p.page_size, run = std::min(p.page_size - slot, end - t);
      f(table[t / p.page_size], slot, run);
      t += run;
    }
    return end - begin;
  }
  // Addresses of the keys, of at most `most` tokens; then the number of them.
  int64_t gather(const char** keys, int64_t most) const {
    const int64_t row = row_bytes();
    return pages(most, [&](int64_t page, int64_t slot, int64_t run) {
      const char* at =
          (const char*)p.pages + page * p.page_stride * size_of(p.page_dtype) + 2 * head * value_offset() + slot * row;
      for (int64_t i = 0; i < run; i++, at += row) *keys++ = at;
    });
  }
  // All keys, and `ahead` more to be fetched meanwhile: those of what this thread does next.
  void gather(std::vector<const char*>& keys, int64_t ahead, const Tokens* next) const {
    keys.resize(count() + ahead);
    int64_t n = gather(keys.data(), count());
    if (next) n += next->gather(keys.data() + n, ahead);
    std::fill(keys.begin() + n, keys.end(), keys[n - 1]);
  }
};

// Scales of the keys and values of int8 pages, token by token, and zeros for `more` tokens that are not there. They lie
// a line or two a page: fetched before they are read, and those of the next task meanwhile. Unfetched, waiting for them
// was a fifth of a decode step's samples.
struct Scales {
  std::vector<float> keys, values;
  void gather(const Tokens& tokens, int64_t more, const Tokens* next) {
    const PrefixAttentionParams& p = tokens.p;
    keys.resize(tokens.count() + more), values.resize(tokens.count() + more);
    const auto at = [&](const Tokens& of, int64_t page) {
      return p.page_scales + page * p.page_scales_stride + 2 * of.head * p.page_size;
    };
    for (const Tokens* of : {&tokens, next})
      if (of)
        of->pages(of->count(), [&](int64_t page, int64_t, int64_t) {
          __builtin_prefetch(at(*of, page)), __builtin_prefetch(at(*of, page) + p.page_size);
        });
    int64_t n = 0;
    tokens.pages(tokens.count(), [&](int64_t page, int64_t slot, int64_t run) {
      const float* from = at(tokens, page) + slot;
      for (int64_t i = 0; i < run; i++, n++) keys[n] = from[i], values[n] = from[p.page_size + i];
    });
    std::fill(keys.begin() + n, keys.end(), 0.f), std::fill(values.begin() + n, values.end(), 0.f);
  }
};

inline void prefetch_row(const char* row, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(row + i, 0, 2);
}

// W dwords of a row of a page; integers are themselves in bf16.
template <class Op, Dtype PAGES>
Dwords<Op> load_page(const char* row, int64_t d, int64_t left) {
  if constexpr (PAGES == Dtype::i8) {
    simd::vec v[Op::P];  // D is a multiple of every W
    for (int h = 0; h < Op::P; h++)
      v[h] = left > h * simd::W ? simd::load_i8((const int8_t*)row + d + h * simd::W) : simd::zero();
    return to_dwords<Op>(v);
  } else {
    return load_dwords<Op>(PAGES, row, d, left);
  }
}

// Rows by their addresses, as the packing functions read them.
struct PointedRows {
  const char* const* row;
  int64_t D;
  Dtype dtype;
  template <class Op>
  Dwords<Op> load(int64_t i, int64_t end, int64_t d) const {
    return i < end ? load_dwords<Op>(dtype, row[i], d, D - d) : Dwords<Op>{};
  }
};

// One new token of one head, rotated in fp32 in interleaved pairs on its way.
inline void rotate(Dtype dtype, const void* from, void* to, int64_t D, const float* angles, int64_t dims) {
  std::memcpy(to, from, D * size_of(dtype));
  alignas(64) float x[MAX_HEAD_DIM + simd::W];
  for (int64_t d = 0; d < dims; d += simd::W) simd::store(x + d, load_as_float(dtype, from, d, D - d));
  for (int64_t d = 0; d < dims; d += 2) {
    const float even = x[d], odd = x[d + 1], cos = angles[d], sin = angles[d + 1];
    x[d] = even * cos - odd * sin, x[d + 1] = odd * cos + even * sin;
  }
  for (int64_t d = 0; d < dims; d += simd::W) store_from_float(dtype, to, d, simd::load(x + d), D - d);
}

// A new token's key or value in int8: round(x / scale), scale = absmax / 127, or 0 where that is no normal number. Of a
// row that is not finite the scale is NaN, which reaches all that see it.
inline void quantise(Dtype dtype, const void* from, int8_t* to, float& scale, int64_t D) {
  alignas(64) float x[MAX_HEAD_DIM];
  simd::vec most = simd::zero(), nan = simd::zero();
  for (int64_t d = 0; d < D; d += simd::W) {
    const simd::vec v = load_as_float(dtype, from, d, D - d);
    simd::store(x + d, v);
    most = simd::max(most, simd::abs(v)), nan = simd::fma(v, simd::zero(), nan);
  }
  scale = simd::hmax(most) / 127.f + simd::sum(nan);
  if (scale < std::numeric_limits<float>::min()) scale = 0.f;
  const simd::vec divisor = simd::set1(scale > 0.f ? scale : 1.f);
  for (int64_t d = 0; d < D; d += simd::W)
    simd::store(x + d, scale == scale ? simd::round(simd::div(simd::load(x + d), divisor)) : simd::zero());
  for (int64_t d = 0; d < D; d++) to[d] = (int8_t)(int32_t)x[d];
}

// The unnormalised result of a part of a row's tokens.
struct PartSums {
  float* base;  // [D] weights times V, then the maximum and the sum
  int64_t D;
  static int64_t floats(int64_t D) { return D + simd::W; }
  float& maximum() const { return base[D]; }
  float& sum() const { return base[D + 1]; }
};

// Weights are 2^(factor (logit - base)): the difference first, so that a logit of 1e4 costs no digits. A row that has
// seen nothing yet has the maximum -inf; its base is finite, so that no weight is NaN.
inline simd::vec finite_base(simd::vec maximum) { return simd::max(simd::set1(-3e38f), maximum); }
template <int DEGREE>
inline simd::vec weight(simd::vec logit, simd::vec base, simd::vec factor) {
  const simd::vec x = simd::mul(simd::sub(logit, base), factor);
  return exp2_sum<DEGREE>(simd::max(simd::set1(-150.f), x), simd::zero());  // in this order NaN stays; 2^-150 is 0
}

// out = sum of parts / sum of their weights.
inline void merge(Dtype dtype, int64_t D, float factor, const std::vector<PartSums>& parts, void* out) {
  float maximum = -INFINITY, sum = 0.f;
  for (const PartSums& part : parts) maximum = std::max(maximum, part.maximum());
  alignas(64) float total[MAX_HEAD_DIM] = {};
  for (const PartSums& part : parts) {
    if (part.maximum() == -INFINITY) continue;  // whatever its sums hold
    const float share = maximum == part.maximum() ? 1.f : exp2f(factor * (part.maximum() - maximum));
    sum += share * part.sum();
    for (int64_t d = 0; d < D; d += simd::W)
      simd::store(total + d, simd::fma(simd::set1(share), simd::load(part.base + d), simd::load(total + d)));
  }
  const simd::vec inverse = simd::set1(1.f / sum);
  for (int64_t d = 0; d < D; d += simd::W)
    store_from_float(dtype, out, d, simd::mul(simd::load(total + d), inverse), D - d);
}

}  // namespace limber
