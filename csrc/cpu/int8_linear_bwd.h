// Backward of int8_linear: dx = (dy slope(z) scales) integers. The scales are folded into dy before it is quantised to
// two digits; the forward's packed weight is transposed into L2 block by block on its way, 32 input channels wide, and
// then multiplied by the same products. FLOP: 2 M N K, twice as many of 8 bits.
#pragma once
#include "int8_linear_product.h"

namespace limber {

class Int8LinearBackward {
 public:
  static constexpr int64_t CHUNK = 2048;  // of the reduction, over N

  Int8LinearBackward(const Int8LinearParams& params, const Int8Rows& quantised)
      : p(params),
        rows_(quantised),
        width_(round_up(p.K, INT8_K_STEP)),
        blocks_(ceil_div(p.K, BLOCK)),
        group_(std::clamp<int64_t>(blocks_ / (p.threads * 4), 1, GROUP)) {}

  // By all threads of a parallel region; a barrier ends it.
  void run() const {
    const Int8Epilogue::Outputs outputs{p.K,     p.dtype, p.d_x,   p.column_sums, nullptr,
                                        nullptr, false,   nullptr, p.residual,    p.residual_stride};
    Int8Epilogue epilogue(outputs, rows_);
    Buffer<int8_t> panels(group_ * rows_.chunk() * BLOCK);
    Buffer<int32_t> sums(group_ * rows_.most_rows() * BLOCK);
#pragma omp for schedule(dynamic, 1)
    for (int64_t first = 0; first < blocks_; first += group_)
      for (const auto& block : rows_.blocks()) {
        const int64_t count = std::min(group_, blocks_ - first);
        for (int64_t n = 0; n < rows_.padded; n += rows_.chunk()) {
          transpose(first, count, n, panels);
          multiply(count, block, n, panels, sums);
        }
        for (int64_t b = 0; b < count; b++) {
          epilogue.begin(first + b, [&](int64_t n, int c) { return weight(n, (first + b) * BLOCK + c); });
          for (int64_t s = 0; s < block.strips; s++) {
            const Int8Rows::Strip& strip = rows_.strips()[block.strip + s];
            epilogue.finish(strip, sums + (b * block.rows + strip.row) * BLOCK);
          }
        }
      }
  }

 private:
  // Blocks of columns and rows of the weight whose panels lie in L2 together. Of 31 ms for 256 rows by 28672 x 4096
  // products take 20, transposing 7, quantising 2.4; 16 or 32 blocks, 1024 or 4096 rows, and prefetching what is
  // transposed next change nothing.
  static constexpr int64_t GROUP = 8;

  int8_t weight(int64_t n, int64_t k) const {
    return p.packed[n / BLOCK * BLOCK * width_ + (k / 4 * BLOCK + n % BLOCK) * 4 + k % 4];
  }

  // to[block][n / 4][32 k][4 n] of `count` blocks of columns and the chunk of rows from n on.
  void transpose(int64_t first, int64_t count, int64_t n, int8_t* to) const {
    const int64_t chunk = std::min(rows_.chunk(), rows_.padded - n), piece = BLOCK * BLOCK;
    for (int64_t i = 0; i < chunk; i += BLOCK) {
      const int8_t* from = p.packed + (n + i) * width_ + first * piece;
      for (int64_t b = 0; b < count; b++, from += piece) {
        int8_t* panel = to + b * chunk * BLOCK + i * BLOCK;
        n + i < p.N ? transpose_piece(from, panel) : (void)std::memset(panel, 0, piece);
      }
    }
  }

  // [8][32][4] -> [8][32][4]: 4 x 4 bytes in each lane of 16, and the lanes as an 8 x 8 matrix.
  static void transpose_piece(const int8_t* from, int8_t* to) {
#if defined(LIMBER_BF16_PAIRS)
    const __m512i bytes = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    for (int g = 0; g < 8; g += 4)
      for (int h = 0; h < 8; h += 4) {
        __m512i v[4], t[4];
        for (int i = 0; i < 4; i++)
          v[i] = _mm512_shuffle_epi8(_mm512_loadu_si512(from + (g + i) * BLOCK_GROUP + h * 16), bytes);
        for (int i = 0; i < 2; i++) {
          t[i] = _mm512_shuffle_i32x4(v[2 * i], v[2 * i + 1], 0x44);
          t[2 + i] = _mm512_shuffle_i32x4(v[2 * i], v[2 * i + 1], 0xee);
        }
        for (int i = 0; i < 4; i++)
          _mm512_storeu_si512(to + (h + i) * BLOCK_GROUP + g * 16,
                              i % 2 ? _mm512_shuffle_i32x4(t[i / 2 * 2], t[i / 2 * 2 + 1], 0xdd)
                                    : _mm512_shuffle_i32x4(t[i / 2 * 2], t[i / 2 * 2 + 1], 0x88));
      }
#else
    for (int g = 0; g < 8; g++)
      for (int h = 0; h < 8; h++)
        for (int k = 0; k < 4; k++)
          for (int n = 0; n < 4; n++)
            to[h * BLOCK_GROUP + g * 16 + 4 * k + n] = from[g * BLOCK_GROUP + h * 16 + 4 * n + k];
#endif
  }

  // All strips by all panels: a strip comes from L3 once, the panels lie in L2.
  void multiply(int64_t count, const Int8Rows::RowBlock& rows, int64_t n, const int8_t* panels, int32_t* sums) const {
    const int64_t chunk = std::min(rows_.chunk(), rows_.padded - n);
    for (int64_t s = 0; s < rows.strips; s++) {
      const Int8Rows::Strip& strip = rows_.strips()[rows.strip + s];
      const uint8_t* A = rows_.panel(rows, strip, n, chunk);
      const int64_t share = round_up(ceil_div(strip.rows * chunk, count), 64);
      for (int64_t b = 0; b < count; b++)
        int8_product(rows_, strip, A, panels + b * chunk * BLOCK, chunk, sums + (b * rows.rows + strip.row) * BLOCK,
                     n > 0, rows_.tiles ? Ahead::next_block : Ahead::none,
                     (const int8_t*)A + strip.rows * chunk + b * share, share);
    }
  }

  const Int8LinearParams& p;
  const Int8Rows& rows_;
  const int64_t width_, blocks_, group_;
};

}  // namespace limber
