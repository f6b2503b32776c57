// Activations as unsigned integers: x[m][k] = scale[m] (q[m][k] - zero[m]), q of one or two bytes ('digits'), in panels
// that int8_dot.h multiplies. Elements far above the rest of their row are kept apart in fp32.
//
// Two digits cost what bf16 products cost, need no weight in floating point, and are more precise than bf16: the step
// is at most 64 root mean squares of the row / 65535.
#pragma once
#include <omp.h>

#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "int8_dot.h"

namespace limber {

class Int8Rows {
 public:
  // A strip is what one product multiplies: `tokens` rows of x, each one or two rows of digits (row d tokens + t).
  struct Strip {
    int64_t token, row;  // the first token; rows of digits before it in its row block
    int tokens, rows;    // rows / digits >= tokens: AMX tiles are full, and sums of surplus rows are not read
  };
  // Strips whose panels, chunk by chunk of the reduction, stay in L2 while the weight passes by.
  struct RowBlock {
    int64_t strip, strips, row, rows;
  };

  Int8Rows(int64_t M, int64_t K, int digits, int threads, int64_t longest_chunk = MOST_REDUCED)
      : M(M),
        K(K),
        padded(round_up(K, INT8_K_STEP)),
        digits(digits),
        tiles(TILES_FROM && M * digits >= TILES_FROM),
        scale_(M),
        zero_(M),
        strip_of_(M),
        found_(threads) {
    const int most = (tiles ? 2 * 16 : DOT_ROWS) / digits;  // tokens of a strip
    const int64_t in_block = ROWS / (most * digits) * most;
    for (int64_t first = 0; first < M; first += in_block) {
      const int64_t tokens = std::min(in_block, M - first), count = ceil_div(tokens, most);
      RowBlock block{(int64_t)strips_.size(), count, row_count_, 0};
      for (int64_t i = 0, token = first; i < count; i++) {
        const int own = (int)(tiles ? std::min<int64_t>(most, first + tokens - token)
                                    : tokens / count + (i < tokens % count));  // as even as possible
        const int rows = tiles ? (int)round_up(own * digits, 16) : own * digits;
        for (int t = 0; t < own; t++) strip_of_[token + t] = (int32_t)strips_.size();
        strips_.push_back({token, block.rows, own, rows});
        block.rows += rows, token += own;
      }
      row_count_ += block.rows;
      blocks_.push_back(block);
      most_rows_ = std::max(most_rows_, block.rows);
    }
    // Beside the rows, this block of the weight lies in L2 and the next one is on its way there; tiles read both more
    // often. Of blocks for several strips 16384 columns are too many: 16 rows by 4096 x 16384 took 2.2 instead of 1.6
    // ms.
    const int64_t width = std::max<int64_t>(most_rows_ + (tiles ? 2 * BLOCK : 0), 1);
    const int64_t fits = L2_BYTES / width / INT8_K_STEP * INT8_K_STEP;
    const int64_t most_columns = !tiles && strips_.size() > 1 ? 4096 : MOST_REDUCED;
    chunk_ = std::min({padded, longest_chunk, most_columns, std::max<int64_t>(fits, 1024)});
    // 4 KiB pages do not spread over the sets of L2 evenly: large panels start on huge pages.
    const int64_t bytes = row_count_ * padded;
    panels_ = Buffer<uint8_t>(bytes < 1 << 18 ? bytes : std::max<int64_t>(bytes, 2 * HUGE_PAGE));
    if ((int)strips_.size() < threads) lines_ = Buffer<uint8_t>(row_count_ * pitch_);
  }

  // Fills the panels, by all threads of a parallel region; a barrier ends it. source(m, to) writes row m as floats.
  // `threshold` is where outliers begin; 0 looks for those that would spoil their row.
  //
  // Rows are rounded one by one and lie apart until their strip is complete: in a panel they share every line. Two
  // threads that wrote rows of one strip took 0.6 to 0.9 instead of 0.2 ms for 512 x 4096 in 8 bits.
  template <class Source>
  void quantise(const Source& source, float threshold) {
    Buffer<float> row(padded + simd::W);
    std::memset(row + K, 0, (padded + simd::W - K) * sizeof(float));
    std::vector<Outlier>& found = found_[omp_get_thread_num()];
    const auto round = [&](int64_t m, uint8_t* lines) {
      source(m, row.get());
      quantise_row(m, row, threshold, found, lines);
    };
    if (!lines_.get()) {  // strips for every thread
      Buffer<uint8_t> lines((tiles ? 2 * 16 : DOT_ROWS) * pitch_);
#pragma omp for schedule(dynamic, 1)
      for (int64_t s = 0; s < (int64_t)strips_.size(); s++) {
        for (int t = 0; t < strips_[s].tokens; t++) round(strips_[s].token + t, lines);
        fill_panel(strips_[s], lines, 0, padded);
      }
    } else {
#pragma omp for schedule(dynamic, 1)
      for (int64_t m = 0; m < M; m++) round(m, own_lines(strips_[strip_of_[m]]));
#pragma omp for collapse(2) schedule(static)
      for (int64_t s = 0; s < (int64_t)strips_.size(); s++)
        for (int64_t k = 0; k < padded; k += PART)
          fill_panel(strips_[s], own_lines(strips_[s]), k, std::min(k + PART, padded));
    }
#pragma omp single
    gather_outliers();
  }

  const uint8_t* panel(const RowBlock& block, const Strip& strip, int64_t k, int64_t count) const {
    return panels_ + block.row * padded + block.rows * k + strip.row * count;
  }

  float scale(int64_t token) const { return scale_[token]; }
  int32_t zero(int64_t token, int digit) const {
    return digit ? zero_[token] >> 8 : zero_[token] & (digits == 2 ? 255 : -1);
  }

  // Columns in which some row has an outlier, and their elements [M][columns], zero where the row has none.
  const std::vector<int32_t>& outlier_columns() const { return columns_; }
  const float* outliers(int64_t token) const { return values_ + token * (int64_t)columns_.size(); }

  const std::vector<Strip>& strips() const { return strips_; }
  const std::vector<RowBlock>& blocks() const { return blocks_; }
  int64_t chunk() const { return chunk_; }  // of the reduction
  int64_t most_rows() const { return most_rows_; }

  const int64_t M, K, padded;
  const int digits;
  const bool tiles;

 private:
  static constexpr int64_t ROWS = 512,
                           L2_BYTES = 5 << 18;  // rows of digits of a row block; what a chunk may take of L2
#if defined(LIMBER_ISA_AMX)
  static constexpr int TILES_FROM = 9;  // rows of digits; below, dot products keep up with memory
#else
  static constexpr int TILES_FROM = 0;  // never
#endif
  static constexpr float INF = std::numeric_limits<float>::infinity();
  static constexpr int64_t PART = 1024;  // columns that a thread brings into a panel at a time, where strips are few
  static constexpr float FAR = 32;       // root mean squares; no more than K / 1024 elements lie beyond

  struct Outlier {
    int64_t token;
    int32_t column;
    float value;
  };

  struct Range {
    float low = 0, high = 0;
    int64_t inside = 0;
  };
  // Of the elements below the limit; with them all `inside` is K rounded up.
  Range range(const float* row, float limit) const {
    simd::vec low = simd::zero(), high = simd::zero();
    const simd::vec most = simd::set1(limit);
    Range r;
    for (int64_t k = 0; k < K; k += simd::W) {
      const simd::vec x = simd::load(row + k);
      const simd::mask m = simd::less(simd::abs(x), most);
      const simd::vec v = simd::select(m, x, simd::zero());
      low = simd::min(low, v), high = simd::max(high, v);
      r.inside += simd::count(m);
    }
    r.low = simd::hmin(low), r.high = simd::hmax(high);
    return r;
  }

  // Where outliers begin without a threshold. A row without one, most of them, has its range from the same pass.
  float far_limit(const float* row, Range& r) const {
    simd::vec low = simd::zero(), high = simd::zero(), squares = simd::zero();
    for (int64_t k = 0; k < K; k += simd::W) {
      const simd::vec x = simd::load(row + k);
      low = simd::min(low, x), high = simd::max(high, x);
      squares = simd::fma(x, x, squares);
    }
    const float sum = simd::sum(squares);
    // Overflows, is NaN or vanishes: elements that are not finite stand out alone.
    if (!(sum > 1e-30f && sum < INF)) return INF;
    const float limit = K < FAR * FAR ? INF : FAR * std::sqrt(sum / (float)K);
    r.low = simd::hmin(low), r.high = simd::hmax(high);
    if (std::max(-r.low, r.high) < limit) r.inside = round_up(K, simd::W);
    return limit;
  }

  void quantise_row(int64_t m, float* row, float threshold, std::vector<Outlier>& found, uint8_t* lines) {
    Range r;
    const float limit = threshold ? threshold : far_limit(row, r);
    if (!r.inside) r = range(row, limit);
    if (r.inside < round_up(K, simd::W))
      for (int64_t v = 0; v < K; v += simd::W) {
        if (simd::count(simd::less(simd::abs(simd::load(row + v)), simd::set1(limit))) == simd::W) continue;
        for (int64_t k = v; k < std::min(v + simd::W, K); k++)
          if (!(std::fabs(row[k]) < limit)) found.push_back({m, (int32_t)k, row[k]}), row[k] = 0;
      }
    const float top = digits == 2 ? 65535.f : 255.f;
    const float step = r.high / top - r.low / top;
    const float inverse = step >= std::numeric_limits<float>::min() ? 1 / step : 0;
    const float zero = __builtin_rintf(-r.low * inverse);
    scale_[m] = step, zero_[m] = (int32_t)zero;

    const Strip& strip = strips_[strip_of_[m]];
    uint8_t* low = lines + (m - strip.token) * pitch_;
    uint8_t* high = digits == 2 ? low + strip.rows / 2 * pitch_ : nullptr;
    for (int64_t k = 0; k < padded; k += INT8_K_STEP) {
      alignas(64) float q[INT8_K_STEP];
      for (int j = 0; j < INT8_K_STEP; j += simd::W) {
        const simd::vec x = simd::mul(simd::load(row + k + j), simd::set1(inverse));
        const simd::vec u = simd::add(simd::round(x), simd::set1(zero));
        simd::store(q + j, simd::min(simd::set1(top), simd::max(simd::zero(), u)));
      }
      for (int j = 0; j < INT8_K_STEP; j++) low[k + j] = (uint8_t)(int32_t)q[j];
      if (high)
        for (int j = 0; j < INT8_K_STEP; j++) high[k + j] = (uint8_t)((int32_t)q[j] >> 8);
    }
  }

  uint8_t* own_lines(const Strip& strip) const {
    return lines_ + (blocks_[block_of(strip.token)].row + strip.row) * pitch_;
  }

  // Columns [k, end) of a strip's panel from its rows of digits, `lines`, pitch_ bytes apart.
  void fill_panel(const Strip& strip, const uint8_t* lines, int64_t k, int64_t end) {
    const RowBlock& block = blocks_[block_of(strip.token)];
    for (; k < end; k += INT8_K_STEP) {
      const int64_t chunk = k / chunk_ * chunk_;
      uint8_t* to = const_cast<uint8_t*>(panel(block, strip, chunk, std::min(chunk_, padded - chunk)));
      to += (k - chunk) * strip.rows;
      if (tiles)
        for (int r = 0; r < strip.rows; r++, to += INT8_K_STEP) std::memcpy(to, lines + r * pitch_ + k, INT8_K_STEP);
      else
        interleave(lines + k, strip.rows, to);
    }
  }

  // INT8_K_STEP bytes of each of `rows` lines, 4 of one after 4 of the other.
  void interleave(const uint8_t* lines, int rows, uint8_t* to) const {
#if defined(LIMBER_BF16_PAIRS)
    simd::vec v[simd::W];  // a line each
    for (int r = 0; r < simd::W; r++) v[r] = r < rows ? simd::loadu((const float*)(lines + r * pitch_)) : simd::zero();
    simd::transpose(v);
    for (int g = 0; g < simd::W; g++) simd::store_first((float*)to + g * rows, v[g], rows);
#else
    for (int g = 0; g < INT8_K_STEP; g += 4)
      for (int r = 0; r < rows; r++, to += 4) std::memcpy(to, lines + r * pitch_ + g, 4);
#endif
  }

  int64_t block_of(int64_t m) const {
    int64_t b = 0;
    while (b + 1 < (int64_t)blocks_.size() && strips_[blocks_[b + 1].strip].token <= m) b++;
    return b;
  }

  void gather_outliers() {
    for (const auto& found : found_)
      for (const Outlier& o : found) columns_.push_back(o.column);
    if (columns_.empty()) return;
    std::sort(columns_.begin(), columns_.end());
    columns_.erase(std::unique(columns_.begin(), columns_.end()), columns_.end());
    const int64_t width = (int64_t)columns_.size();
    values_ = Buffer<float>(M * width);
    std::memset(values_, 0, M * width * sizeof(float));
    for (const auto& found : found_)
      for (const Outlier& o : found)
        values_[o.token * width + (std::lower_bound(columns_.begin(), columns_.end(), o.column) - columns_.begin())] =
            o.value;
  }

  Buffer<float> scale_;
  Buffer<int32_t> zero_, strip_of_;
  std::vector<Strip> strips_;
  std::vector<RowBlock> blocks_;
  int64_t row_count_ = 0, most_rows_ = 0, chunk_ = 0;
  Buffer<uint8_t> panels_;
  const int64_t pitch_ = padded + 64;  // a power of two would put all rows into one set of L1
  Buffer<uint8_t> lines_;              // rows of digits where strips are fewer than threads, in the order of the panels
  std::vector<std::vector<Outlier>> found_;
  std::vector<int32_t> columns_;
  Buffer<float> values_;
};

// The calling thread's tiles, where rows are multiplied on tiles.
inline auto tile_session([[maybe_unused]] const Int8Rows& rows) {
#if defined(LIMBER_ISA_AMX)
  return std::unique_ptr<TileSession>(rows.tiles ? new TileSession : nullptr);
#else
  return nullptr;
#endif
}

}  // namespace limber
