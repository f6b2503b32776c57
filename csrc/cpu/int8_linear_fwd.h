// Forward of int8_linear: the packed weight streams by once, block of 32 output channels after block, each multiplied
// by all strips of quantised rows. FLOP: 2 M N K, with two digits twice as many of 8 bits.
//
// An element is one sum of integers: the same for any number of threads.
#pragma once
#include "int8_linear_product.h"

namespace limber {

class Int8LinearForward {
 public:
  Int8LinearForward(const Int8LinearParams& params, const Int8Rows& quantised)
      : p(params), rows_(quantised), blocks_(ceil_div(p.N, BLOCK)) {
    whole_ = rows_.chunk() >= rows_.padded;
    group_ = whole_ ? std::clamp<int64_t>(blocks_ / (p.threads * 16), 1, 16) : 8;
  }

  // By all threads of a parallel region; a barrier ends it.
  void run() const {
    const Int8Epilogue::Outputs outputs{p.N,    p.dtype, p.out,           p.row_sums, p.scales,
                                        p.bias, p.gelu,  p.preactivation, p.residual, p.residual_stride};
    Int8Epilogue epilogue(outputs, rows_);
    Buffer<int32_t> sums(std::max<int64_t>((whole_ ? 1 : group_) * rows_.most_rows(), 32) * BLOCK);
#pragma omp for schedule(dynamic, 1)
    for (int64_t first = 0; first < blocks_; first += group_)
      for (const auto& block : rows_.blocks())
        for (int64_t k = 0; k < rows_.padded; k += rows_.chunk())
          for (int64_t b = first; b < std::min(first + group_, blocks_); b++)
            multiply(b, b - first, block, k, epilogue, sums);
  }

 private:
  // With this many strips tiles take the block in steps along K that stay in L1: 10.4 instead of 14.3 ms at M = 256,
  // for tiles of A and B that both come from L2 reach 54% of the peak, with B in L1 75%. With fewer it does not pay.
  // 28672 x 4096 by 256 rows of 8 bits takes 12.5 ms, 10.0 with all of the weight in L2, 9.1 without the epilogue too;
  // products alone would take 4.3. Loads from L2, of A and of sums, and the weight's lines from memory hardly overlap,
  // as if for want of line fill buffers. Lost, against 11.5 ms in other runs: 48 x 32 sums over the whole K (66% of the
  // peak alone, but 12.2 ms), 16 x 64 sums (12.8 to 14), asking for the next sums beforehand (12), for every other line
  // of the weight (13.5), and A in L1 while B passes (45% of the peak alone).
  static constexpr int64_t L1_STEP = 512, FEW_STRIPS = 4;
  // Of few strips of tiles the first asks for its own block, this far ahead. For the next block, as many strips do, the
  // few would have to ask faster than memory answers: by 4096 x 20480 4.6 instead of 3.3 ms for 16 rows, 6.6 instead of
  // 4.8 ms for 64.
  static constexpr int64_t NEAR = 8192;

  const int8_t* weights(int64_t block, int64_t k) const { return p.packed + (block * rows_.padded + k) * BLOCK; }

  void multiply(int64_t b, int64_t in_group, const Int8Rows::RowBlock& rows, int64_t k, Int8Epilogue& epilogue,
                int32_t* sums) const {
    const int64_t count = std::min(rows_.chunk(), rows_.padded - k);
    const int8_t *B = weights(b, k), *next = weights(std::min(b + 1, blocks_ - 1), k);
    const bool last = k + count == rows_.padded;
    if (last) epilogue.begin(b, [&](int64_t i, int c) { return weights(b, 0)[i / 4 * BLOCK_GROUP + 4 * c + i % 4]; });
    // Each strip asks for its share of the next block: all of it in the first two takes half of their rate.
    const bool near = rows_.tiles && rows.strips < FEW_STRIPS;
    int64_t shares = near ? 1 : rows.strips;
    if (!rows_.tiles)
      for (shares = 2; 2 * shares <= rows.strips;) shares *= 2;
    sums += whole_ ? 0 : in_group * rows_.most_rows() * BLOCK;
    const int64_t step = rows_.tiles && !near ? std::min(L1_STEP, count) : count;
    for (int64_t i = 0; i < count; i += step) {
      const int64_t part = std::min(step, count - i), share = round_up(ceil_div(part * BLOCK, shares), 64);
      const bool done = last && i + part == count;
      for (int64_t s = 0; s < rows.strips; s++) {
        const Int8Rows::Strip& strip = rows_.strips()[rows.strip + s];
        const Ahead kind = rows.strips == 1 && !rows_.tiles ? Ahead::own_block
                           : s < shares                     ? Ahead::next_block
                                                            : Ahead::none;
        int32_t* to = sums + (whole_ && step == count ? 0 : strip.row * BLOCK);  // one tile in L1 where that is enough
        if (done) epilogue.expect(strip);
        int8_product(rows_, strip, rows_.panel(rows, strip, k, count) + i * strip.rows, B + i * BLOCK, part, to,
                     k + i > 0, kind, near ? B + i * BLOCK + NEAR : next + i * BLOCK + s * share, share);
        if (done) epilogue.finish(strip, to);
      }
    }
  }

  const Int8LinearParams& p;
  const Int8Rows& rows_;
  const int64_t blocks_;
  int64_t group_;
  bool whole_;
};

}  // namespace limber
