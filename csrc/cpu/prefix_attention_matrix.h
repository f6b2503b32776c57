// Attention of many rows as products of blocks: x^T = K q^T, weights in place, sums += weights V.
//
// x^T has a key per row and a query per lane, so that K is read as it lies, row by row, and softmax needs no sums or
// maxima across a vector. A block of keys and values is packed once for all rows of a task.
#pragma once
#include "prefix_attention_common.h"

namespace limber {

// Op: of the products; DTYPE: of q; PAGES: of keys and values, whose scales join the logits and the weights.
template <class Op, Dtype DTYPE, Dtype PAGES>
class MatrixAttention {
  static constexpr bool SCALED = PAGES == Dtype::i8;
  static constexpr int MR = Op::MR, W = simd::W, P = Op::P, PARTS = Op::PARTS;
  static constexpr int KEYS = Op::TILES ? 256 : 168;  // of a block; a multiple of every MR and of pairs
  static constexpr int AHEAD = 16;                    // tokens, as in VectorAttention
  static constexpr int LDK = MAX_HEAD_DIM / P + W;    // dwords between keys that a vector product reads in place
  static_assert(KEYS % MR == 0 && KEYS % (P * Op::K_STEP) == 0 && (!Op::TILES || NR == MR), "whole tiles");

 public:
  static constexpr int ROWS =
      256;  // of a task, which reads all its keys and values again: 128 take 1.25 times as long at 1024 rows
  static_assert(ROWS % NR == 0, "whole panels");

  explicit MatrixAttention(const PrefixAttentionParams& params)
      : p(params),
        Kd_(dwords<Op>(p.D)),
        ldo_(round_up(p.D, NR) + W),
        factor_(p.scale * (float)LOG2E),
        q_(ROWS * Kd_),
        k_(Op::TILES ? KEYS * Kd_ : KEYS * LDK),
        v_(round_up(p.D, NR) * dwords<Op>(KEYS)),
        x_(KEYS * NR),
        e_(Op::TILES ? NR * dwords<Op>(KEYS)
           : P == 2  ? KEYS / 2 * NR
                     : 0),
        o_(ROWS * ldo_) {}

  // Rows q[0 .. R-1] of a head over tokens, of which row r sees those below limit[r] (not decreasing).
  void run(const void* const* q, const float* limit, int R, const Tokens& tokens, const Tokens* next) {
    pack_transposed<Op, NR>(PointedRows{(const char* const*)q, p.D, DTYPE}, 0, R, q_);
    tokens.gather(keys_, AHEAD, next);
    value_ = tokens.value_offset();
    if (SCALED) scales_.gather(tokens, KEYS, next);
    for (int r = 0; r < round_up(R, NR); r++) {
      limit_[r] = std::min<float>(limit[std::min(r, R - 1)], tokens.end) - tokens.begin;
      maximum_[r] = -INFINITY, sum_[r] = 0.f;
    }
    fresh_ = 0;
    const int64_t total = tokens.count();
    for (int64_t at = 0; at < total; at += KEYS) {
      const int n = (int)std::min<int64_t>(KEYS, total - at);
      pack(at, n);
      for (int r = 0; r < R; r += NR) {
        const int seen = (int)std::min<float>(n, limit_[std::min(r + NR, R) - 1] - at);
        if (seen > 0) block(r, seen, at);
      }
    }
  }

  // Row r: its maximum and sum, and its unnormalised result.
  float maximum(int r) const { return maximum_[r]; }
  float sum(int r) const { return sum_[r]; }
  const float* sums(int r) const { return o_ + r * ldo_; }

 private:
  // Keys as left operands (AMX) or as rows at a distance of LDK dwords, values as right operands; token by token, for
  // memory is read in that order, and further tokens are fetched meanwhile. Fetching the next block between the
  // products of this one costs them more than it saves: 1.35 times the time of a shared prefix.
  void pack(int64_t at, int n) {
    const char* const* key = keys_.data() + at;
    const int64_t bytes = p.D * size_of(PAGES), panel = dwords<Op>(KEYS);
    const int padded = (int)round_up(n, P * Op::K_STEP);
    for (int j = 0; j < padded; j += P) {
      Dwords<Op> pair[P];
      for (int i = 0; i < P && j + i < n; i++) {
        prefetch_row(key[j + i + AHEAD], bytes), prefetch_row(key[j + i + AHEAD] + value_, bytes);
        pack_key(key[j + i], j + i);
      }
      for (int64_t d = 0; d < p.D; d += P == 1 ? W : NR) {
        for (int i = 0; i < P; i++)
          pair[i] = j + i < n ? load_page<Op, PAGES>(key[j + i] + value_, d, p.D - d) : Dwords<Op>{};
        float* to = v_ + d / NR * NR * panel;
        if constexpr (P == 1) {
          simd::store(to + j * NR + d % NR, pair[0].part[0]);
        }
#if defined(LIMBER_BF16_PAIRS)
        else
          for (int q = 0; q < PARTS; q++) {
            const int k = j / P;
            simd::vec lo, hi;
            simd::zip_rows(pair[0].part[q], pair[1].part[q], lo, hi);
            float* out = to + ((k / W * PARTS + q) * W + k % W) * NR;
            simd::store(out, lo), simd::store(out + W, hi);
          }
#endif
      }
    }
  }
  void pack_key(const char* key, int j) {
    for (int64_t d = 0; d < p.D; d += P * W) {
      const Dwords<Op> x = load_page<Op, PAGES>(key, d, p.D - d);
      for (int q = 0; q < PARTS; q++)
        simd::store(
            Op::TILES ? k_ + j / MR * MR * Kd_ + (d / P * PARTS + q * W) * MR + j % MR * W : k_ + j * LDK + d / P,
            x.part[q]);
    }
  }

  // Rows r .. r + NR - 1 over the n packed keys, token `at` and those after it.
  void block(int r, int n, int64_t at) {
    const bool fresh = !(fresh_ >> r / NR & 1);
    fresh_ |= uint64_t(1) << r / NR;
    const int padded = (int)round_up(n, P * Op::K_STEP);
    for (int j = 0; j < n; j += MR)
      gemm_tile<Op, LDK, 1>(Op::TILES ? MR : std::min(MR, n - j), Kd_, k_ + (Op::TILES ? j * Kd_ : j * LDK),
                            q_ + r * Kd_, x_ + j * NR, NR, NR, false);
    alignas(64) float keep[NR];
    for (int h = 0; h < NR; h += W) softmax(r + h, h, n, padded, at, keep + h);
    if (!fresh)
      for (int i = 0; i < NR; i++) {
        if (keep[i] == 1.f) continue;
        float* o = o_ + (r + i) * ldo_;
        for (int64_t d = 0; d < p.D; d += W) simd::store(o + d, simd::mul(simd::load(o + d), simd::set1(keep[i])));
      }
    const float* e = pack_weights(padded);
    const int64_t kd = dwords<Op>(n);
    for (int64_t d = 0; d < p.D; d += NR) {
      float* o = o_ + r * ldo_ + d;
      const float* v = v_ + d * dwords<Op>(KEYS);
      for (int i = 0; i < NR; i += MR)
        gemm_tile<Op, 1, NR>(std::min(MR, NR - i), kd, e + i, v, o + i * ldo_, ldo_, NR, !fresh);
    }
  }

  // W rows from `row` on, lanes h .. h + W - 1 of x^T: x^T becomes weights; keep = 2^(old maximum - new).
  void softmax(int row, int h, int n, int padded, int64_t at, float* keep) {
    float* x = x_ + h;
    const simd::vec factor = simd::set1(factor_), limit = simd::loadu(limit_ + row), none = simd::set1(-INFINITY);
    const simd::vec before = simd::loadu(maximum_ + row);
    simd::vec top = before;
    const int whole = (int)std::clamp<float>(limit_[row] - at, 0, n);  // keys that all W rows see
    const auto logit = [&](int j) {
      const simd::vec y = simd::load(x + j * NR);
      return SCALED ? simd::mul(y, simd::set1(scales_.keys[at + j])) : y;
    };
    int j = 0;
    for (; j < whole; j++) {
      const simd::vec y = logit(j);
      if (SCALED) simd::store(x + j * NR, y);
      top = simd::max(top, y);
    }
    for (; j < padded; j++) {
      const simd::mask seen = simd::less(simd::set1((float)(at + j)), limit);
      const simd::vec y = simd::select(seen, logit(j), none);
      simd::store(x + j * NR, y);
      top = simd::max(top, y);
    }
    const simd::vec base = finite_base(top);
    simd::vec sum = simd::zero();
    for (j = 0; j < padded; j++) {
      const simd::vec e = weight<Op::EXP2_DEGREE>(simd::load(x + j * NR), base, factor);
      simd::store(x + j * NR, SCALED ? simd::mul(e, simd::set1(scales_.values[at + j])) : e);
      sum = simd::add(sum, e);
    }
    const simd::vec kept = weight<6>(before, base, factor);
    simd::store(keep, kept);
    simd::storeu(maximum_ + row, top);
    simd::storeu(sum_ + row, simd::fma(simd::loadu(sum_ + row), kept, sum));
  }

  // The weights as the left operand of their product with V.
  const float* pack_weights(int padded) {
    if constexpr (Op::TILES) {
      for (int k = 0; k < padded; k += P * W)
        for (int h = 0; h < NR; h += W) {
          simd::vec v[2][W];
          for (int half = 0; half < 2; half++) {
            for (int i = 0; i < W; i++) v[half][i] = simd::load(x_ + (k + half * W + i) * NR + h);
            simd::transpose(v[half]);
          }
          float* to = e_ + k / (P * W) * PARTS * NR * W + h * W;
          for (int i = 0; i < W; i++) {
            const simd::vec pair[2] = {v[0][i], v[1][i]};
            const auto y = to_dwords<Op>(pair);
            for (int q = 0; q < PARTS; q++) simd::store(to + q * NR * W + i * W, y.part[q]);
          }
        }
      return e_;
    }
#if defined(LIMBER_BF16_PAIRS)
    if constexpr (P == 2) {
      for (int j = 0; j < padded; j += 2) {
        const simd::vec even = simd::round_pairs(simd::load(x_ + j * NR), simd::load(x_ + j * NR + W));
        const simd::vec odd = simd::round_pairs(simd::load(x_ + (j + 1) * NR), simd::load(x_ + (j + 1) * NR + W));
        simd::vec lo, hi;
        simd::zip_rows(even, odd, lo, hi);
        simd::store(e_ + j / 2 * NR, lo), simd::store(e_ + j / 2 * NR + W, hi);
      }
      return e_;
    }
#endif
    return x_;
  }

  const PrefixAttentionParams& p;
  const int64_t Kd_, ldo_;
  const float factor_;
  const Buffer<float> q_, k_, v_, x_, e_, o_;
  uint64_t fresh_ = 0;  // panels of rows that have seen a key
  alignas(64) float limit_[ROWS], maximum_[ROWS], sum_[ROWS];
  std::vector<const char*> keys_;
  Scales scales_;
  int64_t value_ = 0;
};

}  // namespace limber
