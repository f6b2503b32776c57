// Cross entropy of logits z = hidden W^T + bias over a frozen int8 vocabulary, with its gradient, in one pass over W.
//
// The labelled rows alone are quantised, once. The vocabulary goes by in chunks of about 4096: the logits of a chunk in
// fp32, their exponentials against the row's maximum so far, and those times W at once, for the chunk lies in L3 still.
// A maximum that rises rescales the row's sums (Milakov and Gimelshein, arXiv 1805.02867). 4 T V D flop, twice as many
// of 8 bits; a gradient that recomputed the logits in the backward pass would take 6, and would have to keep hidden,
// which is as large as its gradient.
//
// The label's own exponential stays out of sums and products: with S = sum of e^z over the others and t = log S - z_y,
//   loss = log(1 + e^t),   d loss / d hidden = sigmoid(t) (sum of e^z_v W_v over the others / S - W_y),
// so that what is small, the loss and the gradient of a token that is all but certain, keeps its relative precision.
#include "../params/frozen_cross_entropy.h"
#include "int8_linear_bwd.h"
#include "int8_linear_fwd.h"

namespace limber {

class FrozenCrossEntropy {
 public:
  explicit FrozenCrossEntropy(const FrozenCrossEntropyParams& params)
      : p(params),
        labelled_(labelled(p)),
        count_((int64_t)labelled_.size()),
        chunk_(round_up(ceil_div(p.V, ceil_div(p.V, CHUNK)), INT8_K_STEP)),
        hidden_(count_, p.D, 2, p.threads),
        exponentials_(p.d_hidden ? count_ : 0, chunk_, 2, p.threads, Int8LinearBackward::CHUNK),
        states_(count_),
        logits_(count_ * chunk_),
        sums_(p.d_hidden ? count_ * p.D : 0) {}

  void run() {
#pragma omp parallel num_threads(p.threads)
    {
      [[maybe_unused]] const auto session = tile_session(hidden_);
      hidden_.quantise(
          [&](int64_t t, float* to) {
            const char* x = (const char*)p.hidden + labelled_[t] * p.hidden_stride * size_of(p.dtype);
            for (int64_t d = 0; d < p.D; d += simd::W) simd::store(to + d, load_as_float(p.dtype, x, d, p.D - d));
          },
          0);
      for (int64_t first = 0; first < p.V && count_; first += chunk_) {
        const int64_t width = std::min(chunk_, p.V - first);
        Int8LinearParams of_chunk = chunk_params(first, width);
        Int8LinearForward(of_chunk, hidden_).run();
        if (p.d_hidden) {
          exponentials_.quantise([&](int64_t t, float* to) { add(t, first, width, to); }, INF);
          if (first) of_chunk.residual = sums_.get(), of_chunk.residual_stride = p.D;
          Int8LinearBackward(of_chunk, exponentials_).run();
        } else {
#pragma omp for schedule(static)
          for (int64_t t = 0; t < count_; t++) add(t, first, width, nullptr);
        }
      }
#pragma omp for schedule(static)
      for (int64_t m = 0; m < p.M; m++) {
        p.losses[m] = 0;
        if (p.d_hidden && p.labels[m] == p.ignore_index)
          std::memset((char*)p.d_hidden + m * p.D * size_of(p.dtype), 0, p.D * size_of(p.dtype));
      }
#pragma omp for schedule(static)
      for (int64_t t = 0; t < count_; t++) finish(t);
    }
  }

 private:
  // Logits of 256 rows and 16 MiB of a weight of 4096 features: the sums of products with it are read and written once
  // a chunk, and a longer one leaves L3 to others.
  static constexpr int64_t CHUNK = 4096;
  static constexpr float INF = std::numeric_limits<float>::infinity();

  struct State {
    float maximum = -INF, label = 0;  // of the others' logits so far; the label's logit
    double sum = 0;                   // of the others' e^(z - maximum); NaN once a logit is NaN or inf
  };

  static std::vector<int64_t> labelled(const FrozenCrossEntropyParams& p) {
    std::vector<int64_t> rows;
    for (int64_t m = 0; m < p.M; m++)
      if (p.labels[m] != p.ignore_index) rows.push_back(m);
    return rows;
  }

  Int8LinearParams chunk_params(int64_t first, int64_t width) const {
    Int8LinearParams c{};
    c.M = count_, c.N = width, c.K = p.D, c.dtype = Dtype::f32, c.threads = p.threads;
    c.packed = p.packed + first * round_up(p.D, INT8_K_STEP);
    c.scales = p.scales + first, c.row_sums = p.row_sums + first, c.column_sums = p.column_sums;
    c.bias = p.bias ? p.bias + first : nullptr;
    c.out = logits_.get(), c.d_x = sums_.get();
    return c;
  }

  // A chunk of a row's logits joins its state; `to` gets e^(z - maximum) scales, as factors of the chunk's integers.
  void add(int64_t t, int64_t first, int64_t width, float* to) {
    State& s = states_[t];
    float* z = logits_ + t * width;
    const int64_t label = p.labels[labelled_[t]] - first;
    if (label >= 0 && label < width) s.label = z[label], z[label] = -INF;
    const auto logits = [&](int64_t v) {
      return simd::select(simd::first(width - v), simd::load_first(z + v, width - v), simd::set1(-INF));
    };
    simd::vec top = simd::set1(-INF);
    for (int64_t v = 0; v < width; v += simd::W) top = simd::max(top, logits(v));
    const float maximum = simd::hmax(top);
    if (maximum > s.maximum) {
      const float factor = std::exp(s.maximum - maximum);
      s.sum *= factor, s.maximum = maximum;
      if (to && first) scale_sums(t, factor);
    }
    const simd::vec shift = simd::set1(s.maximum == -INF ? 0.f : s.maximum);
    simd::vec sum = simd::zero();
    for (int64_t v = 0; v < (to ? chunk_ : width); v += simd::W) {
      const simd::vec e = exp_nonpositive(simd::sub(logits(v), shift));
      sum = simd::add(sum, e);
      if (to) simd::store(to + v, simd::mul(e, simd::load_first(p.scales + first + v, width - v)));
    }
    s.sum += simd::sum(sum);
    if (to && !(s.sum < INF)) std::memset(to, 0, chunk_ * sizeof(float));
  }

  void scale_sums(int64_t t, float factor) {
    float* row = sums_ + t * p.D;
    for (int64_t d = 0; d < p.D; d++) row[d] *= factor;
  }

  void finish(int64_t t) const {
    const State& s = states_[t];
    const int64_t m = labelled_[t], y = p.labels[m];
    const double odds = s.maximum == -INF && s.label > -INF ? -INF : s.maximum + std::log(s.sum) - s.label;
    const bool valid = s.sum < INF && s.label < INF && odds == odds;
    const double loss = (odds > 0 ? odds : 0) + std::log1p(std::exp(-std::fabs(odds)));
    p.losses[m] = valid ? (float)loss : std::numeric_limits<float>::quiet_NaN();
    if (!p.d_hidden) return;
    const double rest = 1 / (1 + std::exp(-odds));  // 1 - the label's probability
    const simd::vec of_sums = simd::set1(valid ? (float)(s.sum > 0 ? rest / s.sum : 0) : p.losses[m]);
    const simd::vec of_label = simd::set1(valid ? (float)(-rest * p.scales[y]) : 0);
    const int8_t* q = p.packed + y / BLOCK * BLOCK * round_up(p.D, INT8_K_STEP) + y % BLOCK * 4;
    for (int64_t d = 0; d < p.D; d += simd::W) {
      alignas(64) float w[simd::W];
      for (int i = 0; i < simd::W; i++) w[i] = q[(d + i) / 4 * BLOCK_GROUP + (d + i) % 4];  // zero beyond D
      const simd::vec g = simd::mul(of_sums, simd::load_first(sums_ + t * p.D + d, p.D - d));
      store_from_float(p.dtype, p.d_hidden, m * p.D + d, simd::fma(of_label, simd::load(w), g), p.D - d);
    }
  }

  const FrozenCrossEntropyParams& p;
  const std::vector<int64_t> labelled_;
  const int64_t count_, chunk_;
  Int8Rows hidden_, exponentials_;
  std::vector<State> states_;
  Buffer<float> logits_, sums_;  // [T, chunk]; [T, D]: of e^(z - maximum) W
};

void frozen_cross_entropy_fwd(const FrozenCrossEntropyParams& p) { FrozenCrossEntropy(p).run(); }

void frozen_cross_entropy_bwd(const FrozenCrossEntropyParams& p) {
  const int64_t bytes = p.D * size_of(p.dtype);
  advise_huge_pages(p.d_hidden, p.M * bytes);
#pragma omp parallel for num_threads(p.threads) schedule(static)
  for (int64_t m = 0; m < p.M; m++) {
    if (p.labels[m] == p.ignore_index) {
      std::memset((char*)p.d_hidden + m * bytes, 0, bytes);
      continue;
    }
    const simd::vec factor = simd::set1(p.d_losses[m]);
    for (int64_t d = 0; d < p.D; d += simd::W) {
      const simd::vec g = load_as_float(p.dtype, p.gradient, m * p.D + d, p.D - d);
      store_from_float(p.dtype, p.d_hidden, m * p.D + d, simd::mul(factor, g), p.D - d);
    }
  }
}

}  // namespace limber
