// What the forward and the backward of info_nce share: blocking, the two towers as packed operands, masks, the tile
// cache.
//
// Logits live in base 2: x_ij = alpha <image_i, text_j> with alpha = scale log2(e); the bias cancels in the softmax and
// is left out. A 'strip' is MR rows by one block of NB columns of x, in L1. The positive of a row is never summed with
// the negatives: losses and gradients of converged rows keep their digits, and a row without negatives gives exactly 0.
#pragma once
#include <cmath>
#include <cstring>

#include "../params/info_nce.h"
#include "exp2.h"
#include "tile_gemm.h"

namespace limber {

template <class Op>
struct Blocks {
  static constexpr int MR = Op::MR;
#if defined(LIMBER_ISA_AMX)
  // Machines with AMX have 2 MiB of L2. Tiles: (NB, MB) of (224, 1024) is 13% slower, (512, 512) and (512, 1024) equal.
  static constexpr int NB = Op::TILES ? 384 : 256, MB = Op::TILES ? 512 : 504;
#else
  // On Zen 5, whose L2 is 1 MiB, (256, 504) is 2% slower at D = 512 and 2 to 15% at 2048 and 4096, though dS and a
  // packed text block then lie in L2 and now, in fp32 and at D = 512, in L3; (192, 504) and (384, 504) are 1 to 2%
  // slower than (256, 504) in fp32, (512, 2016) is no faster; 1,036 rows rather than 1,008 make 1,024 one block (in
  // fp32 up to D = 1024), 2 to 7% in bf16 at N = 1024 and 2048, D = 2048. N = 256 is to be one block of columns: two
  // cost up to 16%. Narrower vectors multiply at half the rate or less: half the bytes, for the 512 KiB of Zen 3's L2.
  static constexpr int NB = simd::W == 16 ? 512 : 256, MB = simd::W == 16 ? 1036 : 504;
#endif
  // Of large steps without a tile cache, whose slots are NB wide: 256 columns where they lie in 512 KiB of L2 and NB do
  // not, as in fp32 at D = 512. 1% at N = 8192; 1% slower at N = 1024. The loss's last bits then depend on the cache.
  static int64_t columns(const InfoNceParams& p) {
    const bool fits = simd::W == 16 && !Op::TILES && dwords<Op>(p.D) > 256 && dwords<Op>(p.D) <= 512;
    return fits && !p.cache_bytes && p.N >= 4096 ? std::min(256, NB) : NB;
  }
  static constexpr int LDS = NB + 16;  // strip stride: an odd number of lines keeps rows out of each other's L1 sets
  // Dwords of a row of dS, of AMX a thirty-second of a panel's; of a pair of rows.
  static constexpr int LDN = Op::TILES ? dwords<Op>(NB) : NB / Op::P + 16;
  static constexpr int LDP = Op::P == 1 ? LDN : Op::TILES ? NB * Op::PARTS : NB + 16;
  static constexpr int CHUNK = Op::TILES ? 512 : 126 / MR * MR;  // rows of a forward task
  static constexpr int GROUP = 32;  // forward tasks between two merges of their column sums
  static_assert(NB % NR == 0 && MB % MR == 0 && (Op::P == 1 || MR % 2 == 0), "blocks are whole tiles");
};

// Bytes, so that with the cache off all stay within 256 MiB + 20 bytes a row of either tower: text panels and their
// accumulator, and what a block of image rows holds. The state is 16 bytes a row, in whose place the forward sums, and
// the gradient of a pair's loss 4. Norms are 4 more, and what statistics and label smoothing need 24: what is beyond
// comes out of the panels', down to a third of them.
constexpr int64_t PANEL_BUDGET = int64_t(96) << 20, ROW_BUDGET = int64_t(24) << 20;
constexpr int64_t MAX_COLUMNS = 65536;  // of a super-block: bounds the forward's per-task column sums

// Of a row or column in the backward: packed twice, and fp32 sums.
template <class Op>
constexpr int64_t packed_bytes(int64_t D) {
  return D * (8 * Op::PARTS / Op::P + 4);
}
// `most` rows or columns in a block, fewer of very wide ones; whole register tiles.
template <class Op>
int64_t block_size(int64_t D, int64_t budget, int64_t tile, int64_t most) {
  return std::clamp(budget / packed_bytes<Op>(D) / tile * tile, tile, most);
}

// The columns in blocks that never straddle text and extra negatives, and super-blocks of them whose panels fit the
// budget.
struct Columns {
  int64_t M, K, NB, text_blocks, count, budget;
  // Even blocks of at most `widest`, 288 columns as 160 + 128 instead of 256 + 32: short products, where blocks were
  // 224 wide and 256 columns 224 + 32, cost 6% of the backward.
  Columns(const InfoNceParams& p, int64_t widest)
      : M(p.M),
        K(p.K),
        NB(K ? widest : round_up(ceil_div(M, ceil_div(M, widest)), NR)),
        text_blocks(ceil_div(M, NB)),
        count(text_blocks + ceil_div(K, NB)),
        budget(std::max(PANEL_BUDGET / 3, PANEL_BUDGET - beyond(p) * (p.N + M + K))) {}
  static int64_t beyond(const InfoNceParams& p) {
    return (p.normalize ? 2 : 0) + (p.label_smoothing > 0 || p.row_correct ? 24 : 0);
  }
  int64_t begin(int64_t b) const { return b < text_blocks ? b * NB : M + (b - text_blocks) * NB; }
  int64_t size(int64_t b) const { return std::min(NB, (b < text_blocks ? M : M + K) - begin(b)); }
  // Blocks b0 .. b1-1 as transposed panels, by all threads of a parallel region: panel by panel, for there may be a
  // single block.
  template <class Op>
  void pack(const Rows& texts, int64_t b0, int64_t b1, float* out) const {
#pragma omp for schedule(dynamic, 2)
    for (int64_t at = 0; at < (b1 - b0) * NB; at += NR) {
      const int64_t b = b0 + at / NB, j = at % NB, end = begin(b) + size(b);
      if (j < size(b))
        pack_transposed<Op, NR>(texts, begin(b) + j, std::min(begin(b) + j + NR, end), out + at * dwords<Op>(texts.D));
    }
  }
  int64_t super_block(int64_t bytes_per_column) const {
    return std::clamp<int64_t>(std::min(budget / bytes_per_column, MAX_COLUMNS) / NB, 1, count);
  }
};

inline Rows image_rows(const InfoNceParams& p, const float* norm) {
  return {p.image, nullptr, p.image_stride, 0, p.N, p.N, p.D, p.dtype, norm};
}
inline Rows text_rows(const InfoNceParams& p, const float* norm) {
  return {p.text, p.extra, p.text_stride, p.extra_stride, p.M, p.M + p.K, p.D, p.dtype, norm};
}

// Scale 0 keeps the order of the logits for d loss / d scale: 1e-30 is 0 in every log-sum-exp.
inline double log2_scale(const InfoNceParams& p) { return (p.scale == 0 ? 1e-30 : p.scale) * LOG2E; }

// From here on one ulp of fp32 is half a bit of x: such a logit is the rounded product itself, as in eager.
constexpr float LARGE_LOGIT = 4e6f;

// x = alpha * dot = n + f, the product split with one rounding of the small f, so that a logit of 1e4 costs no digits.
template <class Op>
struct Logits {
  simd::vec alpha, alpha_low;
  explicit Logits(double a) : alpha(simd::set1((float)a)), alpha_low(simd::set1((float)(a - (float)a))) {}
  void split(simd::vec dot, simd::vec& n, simd::vec& f) const {
    product(dot, n, f);
    f = simd::select(simd::less(simd::set1(LARGE_LOGIT), simd::abs(n)), simd::sub(n, n), f);  // inf - inf: NaN
  }
  // Cheaper where a large x lies so far below its row's maximum that it ends as 0: the polynomial only must not leave
  // its range. In this order of operands NaN stays.
  void split_bounded(simd::vec dot, simd::vec& n, simd::vec& f) const {
    product(dot, n, f);
    f = simd::max(simd::set1(-0.5f), simd::min(simd::set1(0.5f), f));
  }
  static double scalar(double a, float dot) {
    const float x = (float)a * dot;
    return std::fabs(x) > LARGE_LOGIT ? x : a * dot;
  }

 private:
  void product(simd::vec dot, simd::vec& n, simd::vec& f) const {
    n = simd::round(simd::mul(dot, alpha));
    f = simd::fms(dot, alpha, n);
    if constexpr (Op::FP32) f = simd::fma(dot, alpha_low, f);
  }
};

// Which columns are a row's negatives: not its positive, not masked by equal ids, not past the block's end.
struct Negatives {
  const int32_t *labels, *image_ids, *text_ids;
  int64_t M;
  explicit Negatives(const InfoNceParams& p) : labels(p.labels), image_ids(p.image_ids), text_ids(p.text_ids), M(p.M) {}
  int64_t positive(int64_t i) const { return labels ? labels[i] : i; }
  bool whole_tile(int64_t i, int R, int64_t j0, int64_t nb) const {  // every element of the tile is a negative
    if ((image_ids && j0 < M) || nb % simd::W) return false;
    for (int r = 0; r < R; r++) {
      int64_t d = positive(i + r) - j0;
      if (d >= 0 && d < nb) return false;
    }
    return true;
  }
  simd::mask lanes(int64_t i, int64_t j, int64_t left) const {
    simd::mask all = simd::first(left), m = simd::andnot(all, simd::lane(positive(i) - j));
    return image_ids && j < M ? simd::andnot(m, simd::eq(text_ids + j, image_ids[i], all)) : m;
  }
};

// The cache's bytes: whether the forward split its towers, for the backward, which need not look at them again, and
// tiles. Null where there is no room.
struct CacheMemory {
  int32_t* split = nullptr;
  char* tiles = nullptr;
  int64_t bytes = 0;  // of tiles
  explicit CacheMemory(const InfoNceParams& p) {
    if (!p.cache || p.cache_bytes < 192) return;
    char* base = (char*)round_up((int64_t)(uintptr_t)p.cache, 64);
    split = (int32_t*)base, tiles = base + 64, bytes = p.cache_bytes - 192;
  }
};

// Tiles of E = 2^(x - shift) (sigmoid: of d loss / d x) kept from the forward, the first `strips` of them in (block,
// row) order. fp32 tiles for fp32 arithmetic (bf16 tiles would cost the gradient 16 bits), bf16 tiles for bf16. A shift
// of NaN: not kept.
template <class Op>
struct TileCache {
  using elem = std::conditional_t<Op::FP32, float, uint16_t>;
  static constexpr int MR = Op::MR;
  static constexpr int64_t TILE = int64_t(MR) * Blocks<Op>::NB;
  int64_t strips_per_block, strips;
  float* shifts;
  elem* tiles;
  explicit TileCache(const InfoNceParams& p) : strips_per_block(ceil_div(p.N, MR)) {
    const CacheMemory memory(p);
    strips = memory.bytes / (TILE * (int64_t)sizeof(elem) + 4);
    shifts = (float*)memory.tiles;
    tiles = (elem*)(memory.tiles + round_up(strips * 4, 64));
  }
  int64_t index(int64_t block, int64_t i) const {
    int64_t s = block * strips_per_block + i / MR;
    return s < strips ? s : -1;
  }
  bool complete(int64_t blocks) const {  // every strip kept: the backward recomputes nothing
    if (strips < blocks * strips_per_block) return false;
    for (int64_t s = 0; s < blocks * strips_per_block; s++)
      if (shifts[s] != shifts[s]) return false;
    return true;
  }
  static simd::vec load(const elem* p) {
    if constexpr (Op::FP32)
      return simd::load(p);
    else
      return simd::load_bf16(p, simd::W);
  }
  static void store(elem* p, simd::vec v) {
    if constexpr (Op::FP32)
      simd::store(p, v);
    else
      simd::store_bf16(p, v, simd::W);
  }
};

// strip[R x nb] = A panel . B block, or += what dwords k0 .. k1-1 of their Kd add to it. In parts of k, so that A's, 3
// to 24 KiB, stays in L1 while B streams past: up to 10% of the forward on AVX2 at N = 256, D = 2048. AVX-512 goes
// column tile by column tile, for the product to prefetch what comes next: 1%.
template <class Op>
static void dot_strip(float* strip, int R, int64_t Kd, const float* A, const float* B, int64_t nb, int64_t k0,
                      int64_t k1) {
  constexpr int64_t part = simd::W == 16 && !Op::TILES ? INT64_MAX : std::max(128, 64 * Op::PARTS);
  for (int64_t k = k0; k < k1; k += std::min(part, k1 - k))
    for (int64_t j = 0; j < nb; j += NR)
      gemm_tile<Op, 1, Op::MR>(R, std::min(part, k1 - k), A + k * Op::MR, B + j * Kd + k * NR, strip + j,
                               Blocks<Op>::LDS, NR, k > 0);
}

inline void row_norms(const Rows& rows, float* out) {
#pragma omp for schedule(static)
  for (int64_t i = 0; i < rows.count; i++) out[i] = rows.norm_of(i);
}

}  // namespace limber
