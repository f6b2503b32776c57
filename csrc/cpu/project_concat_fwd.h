// Forward of project_concat: blocks of weight rows, packed into L2, times all features; each strip of products gets its
// bias and its mask and is written into its rows of the embedded sequence. FLOP: 2 rows D E.
//
// An element is one sum over D in a fixed order, whatever block it falls in: blocks may depend on the number of
// threads.
#pragma once
#include <optional>

#include "project_concat_common.h"

namespace limber {

// soft prompts -> out[place[r]], each row E elements after the last; before LayerNorm.
template <class Op>
class Projection {
  using B = ProjectBlocks<Op>;
  static constexpr int MR = Op::MR, W = simd::W;
  // Up to this many rows the weight is read once, straight from memory, and not packed.
  static constexpr int FEW = 16;

 public:
  Projection(const ProjectConcatParams& params, void* out, const int64_t* place)
      : p(params),
        out_(out),
        place_(place),
        rows_(prompt_rows(p)),
        few_(Op::PARTS == 1 && rows_ <= FEW),
        few_tiles_(Op::TILES && few_ && p.D % (Op::P * Op::K_STEP) == 0 && p.E >= FEW_COLUMNS),
        Kd_(dwords<Op>(p.D)),
        width_(few_ ? FEW_COLUMNS : B::columns(p.E, Kd_, p.threads)),
        offset_(feature_offsets(p)),
        features_{p.features, offset_, rows_, p.D, p.dtype},
        packed_((few_ ? FEW : round_up(rows_, MR)) * round_up(Kd_, W)),
        scratch_(scratch_floats(p.threads * per_thread())),
        keys_(p.dropout ? rows_ : 0) {
    if (p.dropout) mask_.emplace(p.seed, p.threshold);
  }

  bool finite() const { return finite_; }

  // By all threads of a parallel region; a barrier ends it.
  void run() {
    if (!rows_) return;
    [[maybe_unused]] const typename Op::Session session;
    float* block = scratch_ + omp_get_thread_num() * per_thread();
    float* strip = block + (few_ ? 0 : width_ * Kd_);
#pragma omp for schedule(static) nowait
    for (int64_t r = 0; r < (p.dropout ? rows_ : 0); r++) keys_[r] = mask_->key(r);
#pragma omp for schedule(dynamic, 1)
    for (int64_t r = 0; r < rows_; r += few_ ? FEW : MR)
      if (few_tiles_)
        pack_transposed<Op, FEW>(features_, 0, rows_, packed_);
      else if (few_)
        for (int64_t i = 0; i < rows_; i++)
          for (int64_t k = 0; k < Kd_; k += W)
            simd::store(packed_ + i * round_up(Kd_, W) + k, features_.template load<Op>(i, rows_, k * Op::P).part[0]);
      else
        pack_rows<Op>(features_, r, std::min<int64_t>(r + MR, rows_), packed_ + r * Kd_);
#pragma omp for schedule(dynamic, 1)
    for (int64_t e = 0; e < p.E; e += width_) {
      const int64_t n = std::min(width_, p.E - e);
      if (few_) {
        if constexpr (Op::PARTS == 1) few_tiles_ ? tile_rows(e, n, strip) : dot_rows(e, n, strip);
        for (int64_t r = 0; r < rows_; r++) write(r, e, n, strip + r * FEW_COLUMNS);
        continue;
      }
      pack_transposed<Op, NR>(weight_rows(p), e, e + n, block);
      for (int64_t r = 0; r < rows_; r += MR) {
        const int R = (int)std::min<int64_t>(MR, rows_ - r);
        multiply_strip<Op>(strip, B::LDC, Op::TILES ? MR : R, Kd_, packed_ + r * Kd_, block, NR * Kd_, round_up(n, NR));
        for (int i = 0; i < R; i++) write(r + i, e, n, strip + i * B::LDC);
      }
    }
  }

 private:
  static constexpr int FEW_COLUMNS = 32;

  int64_t per_thread() const { return few_ ? FEW * FEW_COLUMNS : width_ * Kd_ + MR * B::LDC; }

  char* row(int64_t r) const { return (char*)out_ + (place_ ? place_[r] : r) * p.E * size_of(p.dtype); }

  void write(int64_t r, int64_t e, int64_t n, const float* sums) {
    void* to = row(r);
    finite_.see(sums, n);
    alignas(64) float keep[NR];
    for (int64_t j = 0; j < n; j += NR) {
      if (p.dropout) mask_->template factors<NR>(keys_[r], e + j, p.factor, keep);
      simd::vec x[2] = {simd::load(sums + j), simd::load(sums + j + W)};
      for (int h = 0; h < 2; h++) {
        const int64_t at = e + j + h * W;
        if (p.bias) x[h] = simd::add(x[h], load_as_float(p.dtype, p.bias, at, p.E - at));
        if (p.dropout) x[h] = simd::mul(x[h], simd::load(keep + h * W));
      }
      store_two(p.dtype, to, e + j, x[0], x[1], n - j);
    }
  }

  // strip[r][0 .. n-1] = <features r, weight e ..> on AMX tiles; the last block overlaps the one before.
  void tile_rows([[maybe_unused]] int64_t e, [[maybe_unused]] int64_t n, [[maybe_unused]] float* strip) const {
#if defined(LIMBER_ISA_AMX)
    const int64_t back = FEW_COLUMNS - n;
    alignas(64) float sums[FEW_COLUMNS * FEW];
    tile_few(Kd_ / Op::K_STEP, (const char*)weight(e - back), p.weight_stride * size_of(p.dtype), packed_, sums);
    for (int h = 0; h < FEW_COLUMNS; h += W) {
      simd::vec v[W];
      for (int i = 0; i < W; i++) v[i] = simd::load(sums + (h + i) * FEW);
      simd::transpose(v);
      for (int r = 0; r < W; r++) simd::store(strip + r * FEW_COLUMNS + h, v[r]);
    }
    for (int r = 0; back && r < FEW; r++) std::memmove(strip + r * FEW_COLUMNS, strip + r * FEW_COLUMNS + back, 4 * n);
#endif
  }
  // The same by dot products along D.
  void dot_rows(int64_t e, int64_t n, float* strip) const {
    int64_t r = 0;
    for (; r + 8 <= rows_; r += 8) dot_group<8>(r, e, n, strip + r * FEW_COLUMNS);
    for (; r + 4 <= rows_; r += 4) dot_group<4>(r, e, n, strip + r * FEW_COLUMNS);
    for (; r < rows_; r++) dot_group<1>(r, e, n, strip + r * FEW_COLUMNS);
  }
  template <int G>
  void dot_group(int64_t r, int64_t e, int64_t n, float* strip) const {
    const int64_t ld = round_up(Kd_, W);
    const float* x = packed_ + r * ld;
    for (int64_t j = 0; j < n; j += 2) {
      simd::vec sum[2][G];
      const int64_t second = std::min(j + 1, n - 1);
      const void *w0 = weight(e + j), *w1 = weight(e + second);
      for (int g = 0; g < G; g++) sum[0][g] = sum[1][g] = simd::zero();
      for (int64_t k = 0; k < Kd_; k += W) {
        const int64_t d = k * Op::P;
        const simd::vec a = load_dwords<Op>(p.dtype, w0, d, p.D - d).part[0],
                        b = load_dwords<Op>(p.dtype, w1, d, p.D - d).part[0];
#pragma GCC unroll 8
        for (int g = 0; g < G; g++) {
          const simd::vec f = simd::load(x + g * ld + k);
          sum[0][g] = Op::madd(sum[0][g], a, f);
          sum[1][g] = Op::madd(sum[1][g], b, f);
        }
      }
      for (int g = 0; g < G; g++) {
        strip[g * FEW_COLUMNS + j] = simd::sum(sum[0][g]);
        strip[g * FEW_COLUMNS + second] = simd::sum(sum[second != j][g]);
      }
    }
  }
  const void* weight(int64_t e) const { return (const char*)p.weight + e * p.weight_stride * size_of(p.dtype); }

  const ProjectConcatParams& p;
  void* const out_;
  const int64_t* const place_;
  const int64_t rows_;
  const bool few_, few_tiles_;
  const int64_t Kd_, width_;
  const Buffer<int64_t> offset_;
  const PlacedRows features_;
  const Buffer<float> packed_, scratch_;
  const Buffer<Dropout::Key> keys_;
  std::optional<Dropout> mask_;
  Finite<Op> finite_;
};

template <class Op>
class ProjectConcatForward {
 public:
  explicit ProjectConcatForward(const ProjectConcatParams& params)
      : p(params), projection(params, params.inputs_embeds, params.positions) {}

  // False: an infinity was among the inputs (see Finite), and the outputs are not to be used.
  bool run() {
    advise_huge_pages(p.inputs_embeds, p.tokens * p.E * size_of(p.dtype));
#pragma omp parallel num_threads(p.threads)
    {
#pragma omp for schedule(dynamic, 8) nowait
      for (int64_t t = 0; t < p.tokens; t++)
        if (p.input_ids[t] != p.image_token_id) gather(t);
      projection.run();
      if (p.layer_norm) {
#pragma omp for schedule(static)
        for (int64_t r = 0; r < prompt_rows(p); r++) normalize(row(p.positions[r]));
      }
    }
    return projection.finite();
  }

 private:
  void* row(int64_t t) const { return (char*)p.inputs_embeds + t * p.E * size_of(p.dtype); }

  void gather(int64_t t) const {
    const int64_t v = p.input_ids[t], at = v * p.embedding_stride;
    void* out = row(t);
    if (p.embedding_dtype == Dtype::i8) {
      const int8_t* q = (const int8_t*)p.embedding + at;
      const float scale = p.embedding_scales[v];
      alignas(64) float x[simd::W];
      for (int64_t e = 0; e < p.E; e += simd::W) {
        for (int i = 0; i < simd::W; i++) x[i] = e + i < p.E ? (float)q[e + i] * scale : 0.f;
        store_from_float(p.dtype, out, e, simd::load(x), p.E - e);
      }
      return;
    }
    const char* in = (const char*)p.embedding + at * size_of(p.embedding_dtype);
    if (p.embedding_dtype == p.dtype)
      std::memcpy(out, in, p.E * size_of(p.dtype));
    else
      for (int64_t e = 0; e < p.E; e += simd::W)
        store_from_float(p.dtype, out, e, load_as_float(p.embedding_dtype, in, e, p.E - e), p.E - e);
  }

  // In place: the row holds the projection in the features' dtype, as eager's LayerNorm would read it.
  void normalize(void* row) const {
    const RowMoments moments(p.dtype, row, p.E, p.ln_eps);
    const simd::vec mean = simd::set1(moments.mean), rstd = simd::set1(moments.rstd);
    for (int64_t e = 0; e < p.E; e += simd::W) {
      const int64_t left = p.E - e;
      simd::vec x = simd::mul(simd::sub(load_as_float(p.dtype, row, e, left), mean), rstd);
      if (p.ln_weight) x = simd::mul(x, simd::load_first(p.ln_weight + e, left));
      if (p.ln_bias) x = simd::add(x, simd::load_first(p.ln_bias + e, left));
      store_from_float(p.dtype, row, e, x, left);
    }
  }

  const ProjectConcatParams& p;
  Projection<Op> projection;
};

}  // namespace limber
