// Products of quantised rows with blocks of 32 columns, and the epilogue that follows each while its sums are in L1.
#pragma once
#include "../params/int8_linear.h"
#include "gelu.h"
#include "int8_rows.h"

namespace limber {

// y = residual + gelu(weight_scale (scale (sums - zero weight_sums) + outliers) + bias), where given, for one block.
class Int8Epilogue {
 public:
  struct Outputs {
    int64_t columns;  // of the result
    Dtype dtype;
    void* out;
    const int32_t* weight_sums;  // [columns]
    const float *scales, *bias;  // [columns] or null
    bool gelu;
    void* preactivation;
    const void* residual;
    int64_t residual_stride;
  };

  Int8Epilogue(const Outputs& outputs, const Int8Rows& rows)
      : o(outputs),
        rows(rows),
        past_caches_(rows.M * o.columns * size_of(o.dtype) > CACHED),
        far_(rows.outlier_columns().size() * BLOCK) {}

  ~Int8Epilogue() {
#if defined(LIMBER_BF16_PAIRS)
    simd::stream_end();
#endif
  }

  // element(k, c): the integer of reduced index k and column c of the block, for outliers.
  template <class Element>
  void begin(int64_t block, const Element& element) {
    column_ = block * BLOCK, left_ = std::min<int64_t>(BLOCK, o.columns - column_);
    std::memset(sums_, 0, sizeof(sums_)), std::memcpy(sums_, o.weight_sums + column_, left_ * sizeof(int32_t));
    std::fill(scale_, scale_ + BLOCK, 1.f), std::memset(bias_, 0, sizeof(bias_));
    if (o.scales) std::memcpy(scale_, o.scales + column_, left_ * sizeof(float));
    if (o.bias) std::memcpy(bias_, o.bias + column_, left_ * sizeof(float));
    float* to = far_;
    for (const int32_t k : rows.outlier_columns())
      for (int c = 0; c < BLOCK; c++) *to++ = element(k, c);
  }

  // Before the last product of a strip: the residual's lines, one of each row, arrive while it runs. Without, 512 rows
  // by 12288 x 4096 took 30.3 instead of 27.3 ms.
  void expect(const Int8Rows::Strip& strip) const {
    if (!o.residual) return;
    const int64_t size = size_of(o.dtype), bytes = left_ * size;
    const char* line = (const char*)o.residual + (strip.token * o.residual_stride + column_) * size;
    for (int t = 0; t < strip.tokens; t++, line += o.residual_stride * size) {
      for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(line + i);
      __builtin_prefetch(line + bytes - 1);
    }
    asm volatile("" ::: "memory");  // GCC drops calls that only prefetch
  }

  void finish(const Int8Rows::Strip& strip, const int32_t* sums) const {
    rows.digits == 2 ? finish_rows<2>(strip, sums) : finish_rows<1>(strip, sums);
  }

 private:
  template <int DIGITS>
  void finish_rows(const Int8Rows::Strip& strip, const int32_t* sums) const {
    const int64_t high = strip.rows / DIGITS * BLOCK, width = (int64_t)rows.outlier_columns().size();
    for (int t = 0; t < strip.tokens; t++, sums += BLOCK) {
      const int64_t m = strip.token + t;
      const simd::vec scale = simd::set1(rows.scale(m));
      const int32_t z0 = rows.zero(m, 0), z1 = DIGITS == 2 ? rows.zero(m, 1) : 0;
      const int64_t at = m * o.columns + column_;
      simd::vec block[VECTORS];
      for (int v = 0, h = 0; v < VECTORS; v++, h += simd::W) {
        simd::vec y = compensated(sums + h, z0, sums_ + h);
        if (DIGITS == 2) y = simd::fma(compensated(sums + high + h, z1, sums_ + h), simd::set1(256.f), y);
        y = simd::mul(y, scale);
        const float* x = width ? rows.outliers(m) : nullptr;
        for (int64_t u = 0; u < width; u++)
          if (x[u] != 0) y = simd::fma(simd::set1(x[u]), simd::load(far_ + u * BLOCK + h), y);
        y = simd::fma(y, simd::load(scale_ + h), simd::load(bias_ + h));
        block[v] = y;
      }
      if (o.preactivation) store(o.preactivation, at, block);
      for (int v = 0, h = 0; v < VECTORS; v++, h += simd::W) {
        if (o.gelu) block[v] = GeluNew::value(block[v]);
        if (o.residual)
          block[v] =
              simd::add(block[v], load_as_float(o.dtype, o.residual, m * o.residual_stride + column_ + h, left_ - h));
      }
      store(o.out, at, block);
    }
  }

  // Whole lines go past the caches where no cache keeps the result: rows lie far apart, and their lines would be read
  // first (AMX, M = 256: 20.8 instead of 14.2 ms).
  void store(void* to, int64_t at, const simd::vec* block) const {
#if defined(LIMBER_BF16_PAIRS)
    float* line = (float*)((char*)to + at * size_of(o.dtype));
    if (left_ == BLOCK && past_caches_ && (uintptr_t)line % 64 == 0 && o.dtype != Dtype::f16) {
      if (o.dtype == Dtype::bf16) return simd::stream(line, simd::round_pairs(block[0], block[1]));
      simd::stream(line, block[0]);
      return simd::stream(line + simd::W, block[1]);
    }
#endif
    for (int v = 0, h = 0; v < VECTORS && h < left_; v++, h += simd::W)
      store_from_float(o.dtype, to, at + h, block[v], left_ - h);
  }

  static constexpr int VECTORS = BLOCK / simd::W;

  static constexpr int64_t CACHED = 2 << 20;  // bytes of results that the next op may still find in L2

  const Outputs& o;
  const Int8Rows& rows;
  const bool past_caches_;
  const Buffer<float> far_;
  int64_t column_ = 0, left_ = 0;
  alignas(64) int32_t sums_[BLOCK];
  alignas(64) float scale_[BLOCK], bias_[BLOCK];
};

// One product of a strip and a block's panel.
inline void int8_product(const Int8Rows& rows, const Int8Rows::Strip& strip, const uint8_t* A, const int8_t* B,
                         int64_t count, int32_t* sums, bool accumulate, Ahead kind, const int8_t* ahead,
                         int64_t ahead_bytes) {
#if defined(LIMBER_ISA_AMX)
  if (rows.tiles) {
    const int64_t steps = count / INT8_K_STEP;
    const int64_t a_step = kind == Ahead::next_block ? round_up(ceil_div(ahead_bytes, steps), 64) : 0;
    strip.rows == 32 ? tile_dot<2>(steps, A, B, sums, accumulate, (const char*)ahead, a_step)
                     : tile_dot<1>(steps, A, B, sums, accumulate, (const char*)ahead, a_step);
    return;
  }
#endif
  int64_t period = 1;  // of groups: the lines in `ahead_bytes`, evenly
  while (ahead_bytes && 64 * (count / 4 / period) > ahead_bytes) period *= 2;
  dot_block(strip.rows, count / 4, A, B, sums, accumulate, kind, (const char*)ahead, period);
}

}  // namespace limber
