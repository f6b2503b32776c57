// Kernels of prefix_attention: two launches a layer.
//
// First  what lies in the pages already: every run of shared tokens for the rows of all its members at once, and what
//        a sequence of few new tokens holds alone, but for its last SPLIT tokens. Each block of SPLIT positions leaves
//        a part: weights times V in fp16 over a scale, largest logit, sum of the weights. New tokens are rotated and
//        appended in further blocks: nothing in this launch reads them.
// Second the rest of each sequence, new tokens included, and the merge with its parts. A sequence of MANY or more new
//        tokens (prefill) has no parts and reads all that it sees here.
//
// Splits lie at positions and parts merge in their order: a result depends neither on the chip nor, but for the
// rounding of a merge, on the batch. A weight is 2^(factor (logit - largest)), factor = scale log2(e).
//
// A block of 4 warps owns ROWS queries of one head. The warps share out the keys of a tile in Q K^T and the columns in
// P V, so each K and V fragment is read from shared memory once; sums are fp32. K and V are double buffered by
// cp.async in groups of their own, and P takes the place of the spent K tile: that is what lets two blocks share an SM.
//
// int8 stays int8 up to the fragments, which widen it exactly; scales of keys multiply the logits, those of values the
// weights, over a unit of the block's own that grows with them: so that fp16 holds both ends.
#pragma once

#include "cuda/elements.cuh"
#include "cuda/prefix_attention_rows.cuh"
#include "cuda/ptx.cuh"
#include "params/prefix_attention.h"

namespace limber {

constexpr int KEYS = 32;  // of a tile: one per lane, whose page a lane looks up
constexpr float NONE = -INFINITY;

// Stored_: of keys and values, Element_ or int8_t.
template <class Element_, class Stored_, int D_, int ROWS_>
struct AttentionTile {
  using Element = Element_;
  using Stored = Stored_;
  static constexpr bool SCALED = sizeof(Stored) == 1;
  static constexpr int D = D_, ROWS = ROWS_;
  static constexpr int CHUNKS = D / 8, KV_CHUNKS = D * sizeof(Stored) / 16;  // 16 bytes each, of a row
  static constexpr int ROW_TILES = ROWS / 16;                                // of the mma
  static constexpr int COLUMNS = D / (8 * WARPS);                            // tiles of 8 columns that a warp owns
  static constexpr int Q_BYTES = ROWS * D * 2, TILE_BYTES = KEYS * D * sizeof(Stored);
  static constexpr int SHARED = Q_BYTES + 4 * TILE_BYTES + WARPS * ROWS * 4 + ROWS * 4;
  static_assert(D % 64 == 0 && ROWS % 16 == 0 && ROWS * 2 <= D * sizeof(Stored) && KEYS == 8 * WARPS &&
                THREADS % KV_CHUNKS == 0);
};

// What a block works on: its shared memory by name, and the sums of its rows in registers.
template <class Tile>
struct Attention {
  using Element = typename Tile::Element;
  using Stored = typename Tile::Stored;
  using Two = typename Pair<Element>::type;
  static constexpr bool SCALED = Tile::SCALED;
  static constexpr int D = Tile::D, ROWS = Tile::ROWS, CHUNKS = Tile::CHUNKS, KV_CHUNKS = Tile::KV_CHUNKS,
                       ROW_TILES = Tile::ROW_TILES, COLUMNS = Tile::COLUMNS, TILE_BYTES = Tile::TILE_BYTES;
  static constexpr int PER_LOAD = 2 / sizeof(Stored);  // of four matrices: pairs of steps of Q K^T, columns of P V

  const PrefixAttentionLaunch& p;
  const int head = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int row_of_lane = lane / 4, pair_of_lane = lane % 4;  // in an mma's sums
  char* const q = ptx::dynamic_shared();
  char* const k = q + Tile::Q_BYTES;
  char* const v = k + 2 * TILE_BYTES;
  float* const of_warps = reinterpret_cast<float*>(v + 2 * TILE_BYTES);  // [WARPS, ROWS]
  int* const rows = reinterpret_cast<int*>(of_warps + WARPS * ROWS);     // rows of q, -1 for none

  float* largest_sums = nullptr;  // [WARPS, ROWS] in a K tile that nobody needs any more
  float sums[ROW_TILES][COLUMNS][4], largest[ROW_TILES][2], weights[ROW_TILES][2];

  __device__ __forceinline__ explicit Attention(const PrefixAttentionLaunch& params) : p(params) {}

  // Row `half` of this lane in row tile `tile`.
  __device__ __forceinline__ int row(int tile, int half) const { return 16 * tile + 8 * half + row_of_lane; }
  // First of the two columns of sums[][i]: of int8 a pair of tiles holds even and odd columns until `together`.
  __device__ __forceinline__ int column(int i) const {
    const int tile = (warp * COLUMNS + i) * 8;
    return SCALED ? tile - 6 * (i & 1) + 4 * pair_of_lane : tile + 2 * pair_of_lane;
  }
  __device__ __forceinline__ float factor() const { return p.scale * 1.4426950408889634f; }

  // The queries of `rows`, rotated; row i of sequence rows holds token rows_token(i).
  template <class TokenOf>
  __device__ __forceinline__ void load_queries(const TokenOf& token_of) {
    for (int i = threadIdx.x; i < ROWS * CHUNKS; i += THREADS) {
      const int r = i / CHUNKS, chunk = i % CHUNKS, t = rows[r];
      uint4 x = make_uint4(0, 0, 0, 0);
      if (t >= 0) {
        const Element* from = static_cast<const Element*>(p.q) + t * p.q_stride + int64_t(head) * D + 8 * chunk;
        x = rotated<Element>(*reinterpret_cast<const uint4*>(from), chunk, angles_of(p, t, token_of(t, r)),
                             rotary_dims(p));
      }
      if constexpr (SCALED) {  // pairs 0 2 4 6 1 3 5 7 of 16 dimensions: what a lane reads of such K
        *reinterpret_cast<uint2*>(q + swizzled<CHUNKS>(r, chunk & ~1) + 8 * (chunk & 1)) = make_uint2(x.x, x.z);
        *reinterpret_cast<uint2*>(q + swizzled<CHUNKS>(r, chunk | 1) + 8 * (chunk & 1)) = make_uint2(x.y, x.w);
      } else {
        *reinterpret_cast<uint4*>(q + swizzled<CHUNKS>(r, chunk)) = x;
      }
    }
  }

  // Page of the key of this lane in the tile that begins at token `first`.
  __device__ __forceinline__ int page_of_lane(const int* table, int first, int end) const {
    return first + lane < end ? table[(first + lane) >> p.page_shift] : 0;
  }
  // Scales of the key and the value of this lane; zeros past the end, where anything may lie.
  __device__ __forceinline__ float2 scales_of_lane(int page, int first, int end) const {
    if (!SCALED || first + lane >= end) return make_float2(0.f, 0.f);
    const int place = (first + lane) & ((1 << p.page_shift) - 1);
    const float* at = p.page_scales + page * p.page_scales_stride + ((int64_t(2 * head) << p.page_shift) + place);
    return make_float2(at[0], at[int64_t(1) << p.page_shift]);
  }
  // Copies of the K tile, then of the V tile: two groups. Places past the end become zeros: 0 times NaN is NaN.
  __device__ __forceinline__ void fetch(int buffer, int pages, int first, int end) const {
    constexpr int ROWS_A_STEP = THREADS / KV_CHUNKS;
    const int r0 = threadIdx.x / KV_CHUNKS, chunk = threadIdx.x % KV_CHUNKS, mask = (1 << p.page_shift) - 1;
    const int64_t value = int64_t(D) << p.page_shift;
    const Stored* base = static_cast<const Stored*>(p.pages) + 2 * head * value + int(16 / sizeof(Stored)) * chunk;
#pragma unroll
    for (int kv = 0; kv < 2; ++kv) {
      char* tile = (kv ? v : k) + buffer * TILE_BYTES;
#pragma unroll
      for (int r = r0, i = 0; i < KEYS / ROWS_A_STEP; ++i, r += ROWS_A_STEP) {
        const int64_t page = __shfl_sync(ALL, pages, r);
        const Stored* from = base + page * p.page_stride + kv * value + ((first + r) & mask) * D;
        ptx::copy_async(tile + swizzled<KV_CHUNKS>(r, chunk), from, first + r < end);
      }
      ptx::commit_copies();
    }
  }

  // Sums over tokens begin .. end-1 (at least one); row r sees those before first_limit + r.
  __device__ __forceinline__ void attend(const int* table, int begin, int end, int first_limit) {
    const float scale2 = factor();
    clear();
    int buffer = 0, pages = page_of_lane(table, begin, end);
    float unit = FLT_MIN;  // of the sums: a power of two, the largest scale of a value so far / 2^14 or less
    float2 scales = scales_of_lane(pages, begin, end), next = scales;
    fetch(0, pages, begin, end);
    pages = page_of_lane(table, begin + KEYS, end);
#pragma unroll 1
    for (int at = begin; at < end; at += KEYS, buffer ^= 1) {
      char *keys = k + buffer * TILE_BYTES, *values = v + buffer * TILE_BYTES, *probabilities = keys;
      ptx::wait_copies<1>();
      __syncthreads();  // K is here, and everybody has left the tile before
      if (at + KEYS < end) {
        fetch(buffer ^ 1, pages, at + KEYS, end);
        next = scales_of_lane(pages, at + KEYS, end);
        pages = page_of_lane(table, at + 2 * KEYS, end);
      } else {  // so that the count of groups is that of any other trip
        ptx::commit_copies();
        ptx::commit_copies();
      }
      float logits[ROW_TILES][4] = {};
#pragma unroll 4 / PER_LOAD
      for (int d = 0; d < D; d += 32 * PER_LOAD) {
        uint32_t kf[4];
        ptx::load_matrices(kf, keys + swizzled<KV_CHUNKS>(8 * warp + lane % 8, d / (8 * PER_LOAD) + lane / 8));
#pragma unroll
        for (int u = 0; u < 2 * PER_LOAD; ++u) {
          uint32_t b0, b1;
          if constexpr (SCALED)  // 4 dimensions of a matrix of 16, in the order of load_queries
            b0 = integers<Element, 0x4140>(kf[u]), b1 = integers<Element, 0x4342>(kf[u]);
          else
            b0 = kf[2 * u], b1 = kf[2 * u + 1];
#pragma unroll
          for (int m = 0; m < ROW_TILES; ++m) {
            uint32_t qf[4];
            ptx::load_matrices(qf, q + swizzled<CHUNKS>(16 * m + lane % 16, d / 8 + 2 * u + lane / 16));
            ptx::multiply(Element(), logits[m], qf, b0, b1);
          }
        }
      }
      const int key = at + 8 * warp + 2 * pair_of_lane;
      float2 of_keys{}, of_values{};
      float rescale = 1.f;  // of the sums
      if constexpr (SCALED) {
        const int first = 8 * warp + 2 * pair_of_lane;
        of_keys = make_float2(__shfl_sync(ALL, scales.x, first), __shfl_sync(ALL, scales.x, first + 1));
        of_values = make_float2(__shfl_sync(ALL, scales.y, first), __shfl_sync(ALL, scales.y, first + 1));
        float most = scales.y;
#pragma unroll
        for (int d = 16; d; d >>= 1) most = fmaxf(most, __shfl_xor_sync(ALL, most, d));
        const float larger = fmaxf(unit, power_of_two(most) * 0x1p-14f), inverse = 1.f / larger;
        rescale = unit * inverse, unit = larger;
        of_values.x *= inverse, of_values.y *= inverse, scales = next;
      }
#pragma unroll
      for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int limit = min(end, first_limit + row(m, half));
          float& x = logits[m][2 * half];
          float& y = logits[m][2 * half + 1];
          if constexpr (SCALED) x *= of_keys.x, y *= of_keys.y;
          if (key >= limit) x = NONE;
          if (key + 1 >= limit) y = NONE;
          float most = fmaxf(x, y);
          most = fmaxf(most, __shfl_xor_sync(ALL, most, 1));
          most = fmaxf(most, __shfl_xor_sync(ALL, most, 2));
          if (pair_of_lane == 0) of_warps[warp * ROWS + row(m, half)] = most;
        }
      __syncthreads();  // maxima are here, and nobody reads K any more
#pragma unroll
      for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float most = largest[m][half];
#pragma unroll
          for (int w = 0; w < WARPS; ++w) most = fmaxf(most, of_warps[w * ROWS + row(m, half)]);
          const float base = most == NONE ? 0.f : most;  // the difference first: a logit of 1e4 costs no digits
          const float shrink = ptx::exp2(scale2 * (largest[m][half] - base));
          const float x = ptx::exp2(scale2 * (logits[m][2 * half] - base));
          const float y = ptx::exp2(scale2 * (logits[m][2 * half + 1] - base));
          *reinterpret_cast<Two*>(probabilities + swizzled<KEYS / 8>(row(m, half), warp) + 4 * pair_of_lane) =
              SCALED ? Pair<Element>::round(x * of_values.x, y * of_values.y) : Pair<Element>::round(x, y);
          largest[m][half] = most;
          weights[m][half] = weights[m][half] * shrink + (x + y);
#pragma unroll
          for (int i = 0; i < COLUMNS; ++i)
            sums[m][i][2 * half] *= shrink * rescale, sums[m][i][2 * half + 1] *= shrink * rescale;
        }
      ptx::wait_copies<2>();
      __syncthreads();  // P and V are here
      uint32_t pf[ROW_TILES][2][4];
#pragma unroll
      for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
        for (int u = 0; u < 2; ++u)
          ptx::load_matrices(pf[m][u], probabilities + swizzled<KEYS / 8>(16 * m + lane % 16, 2 * u + lane / 16));
#pragma unroll
      for (int i = 0; i < COLUMNS; i += PER_LOAD) {
        uint32_t vf[4];
        ptx::load_matrices_transposed(vf, values + swizzled<KV_CHUNKS>(lane, (warp * COLUMNS + i) / PER_LOAD));
#pragma unroll
        for (int odd = 0; odd < PER_LOAD; ++odd) {
          uint32_t b[4];
#pragma unroll
          for (int j = 0; j < 4; ++j)
            b[j] = !SCALED ? vf[j] : odd ? integers<Element, 0x4341>(vf[j]) : integers<Element, 0x4240>(vf[j]);
#pragma unroll
          for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
            for (int u = 0; u < 2; ++u) ptx::multiply(Element(), sums[m][i + odd], pf[m][u], b[2 * u], b[2 * u + 1]);
        }
      }
    }
    if constexpr (SCALED) together(unit);
    largest_sums = reinterpret_cast<float*>(k + buffer * TILE_BYTES);  // the last tile lies in the other one
    across_warps();
  }

  // Sum of the weights of all warps, in all of them; each leaves the largest of its sums.
  __device__ __forceinline__ void across_warps() {
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float sum = weights[m][half];
        sum += __shfl_xor_sync(ALL, sum, 1);
        sum += __shfl_xor_sync(ALL, sum, 2);
        if (pair_of_lane == 0) of_warps[warp * ROWS + row(m, half)] = sum;
        float most = 0.f;
#pragma unroll
        for (int i = 0; i < COLUMNS; ++i)
          most = fmaxf(most, fmaxf(fabsf(sums[m][i][2 * half]), fabsf(sums[m][i][2 * half + 1])));
        most = fmaxf(most, __shfl_xor_sync(ALL, most, 1));
        most = fmaxf(most, __shfl_xor_sync(ALL, most, 2));
        if (pair_of_lane == 0) largest_sums[warp * ROWS + row(m, half)] = most;
      }
    __syncthreads();
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float sum = 0.f;
#pragma unroll
        for (int w = 0; w < WARPS; ++w) sum += of_warps[w * ROWS + row(m, half)];
        weights[m][half] = sum;
      }
  }
  // Largest of a row's sums: fp16 over it has 11 digits whatever the size of V.
  __device__ __forceinline__ float scale_of(int r) const {
    float most = 0.f;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) most = fmaxf(most, largest_sums[w * ROWS + r]);
    return most > 1e-30f && most < INFINITY ? most : 1.f;
  }

  __device__ __forceinline__ void store_part(int slot) const {
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int r = row(m, half), t = rows[r];
        if (t < 0) continue;
        const int64_t part = (int64_t(t) * p.H + head) * p.slots + slot;
        const float scale = scale_of(r), inverse = 1.f / scale;
        if (warp == 0 && pair_of_lane == 0)
          reinterpret_cast<float4*>(p.part_heads)[part] = make_float4(largest[m][half], weights[m][half], scale, 0.f);
        __half* to = static_cast<__half*>(p.part_sums) + part * D;
#pragma unroll
        for (int i = 0; i < COLUMNS; ++i)
          *reinterpret_cast<__half2*>(to + column(i)) =
              __floats2half2_rn(sums[m][i][2 * half] * inverse, sums[m][i][2 * half + 1] * inverse);
      }
  }

  // Merges with the row's first `parts` parts, in their order, and writes the result.
  __device__ __forceinline__ void merge(int parts) {
    const float scale2 = factor();
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int t = rows[row(m, half)];
        if (t < 0) continue;
        const int of_row = 16 * m < MANY ? parts : 0;  // a sequence with parts brings fewer rows
        const int64_t at = int64_t(t) * p.H + head;
        const float4* heads = reinterpret_cast<const float4*>(p.part_heads) + at * p.slots;
        const __half* from = static_cast<const __half*>(p.part_sums) + at * p.slots * D;
        float most = largest[m][half];
        for (int i = 0; i < of_row; ++i) most = fmaxf(most, heads[i].x);
        const float base = most == NONE ? 0.f : most, mine = ptx::exp2(scale2 * (largest[m][half] - base));
        float total = weights[m][half] * mine;
#pragma unroll
        for (int i = 0; i < COLUMNS; ++i) sums[m][i][2 * half] *= mine, sums[m][i][2 * half + 1] *= mine;
#pragma unroll 1
        for (int part = 0; part < of_row; ++part) {
          const float4 one = heads[part];
          const float share = ptx::exp2(scale2 * (one.x - base)), weight = share * one.z;
          total += share * one.y;
#pragma unroll
          for (int i = 0; i < COLUMNS; ++i) {
            const float2 x = widen(*reinterpret_cast<const __half2*>(from + int64_t(part) * D + column(i)));
            sums[m][i][2 * half] += weight * x.x, sums[m][i][2 * half + 1] += weight * x.y;
          }
        }
        const float inverse = 1.f / total;  // no logit but -inf: NaN, as in eager
        Element* to = static_cast<Element*>(p.out) + at * D;
#pragma unroll
        for (int i = 0; i < COLUMNS; ++i)
          *reinterpret_cast<Two*>(to + column(i)) =
              Pair<Element>::round(sums[m][i][2 * half] * inverse, sums[m][i][2 * half + 1] * inverse);
      }
  }

 private:
  // Sums times their unit, with neighbouring columns in one lane.
  __device__ __forceinline__ void together(float unit) {
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
      for (int i = 0; i < COLUMNS; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[m][i][j] *= unit;
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
      for (int i = 0; i + 1 < COLUMNS; i += 2)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float odd = sums[m][i + 1][2 * half];
          sums[m][i + 1][2 * half] = sums[m][i][2 * half + 1], sums[m][i][2 * half + 1] = odd;
        }
  }
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m) {
      largest[m][0] = largest[m][1] = NONE, weights[m][0] = weights[m][1] = 0.f;
#pragma unroll
      for (int i = 0; i < COLUMNS; ++i) sums[m][i][0] = sums[m][i][1] = sums[m][i][2] = sums[m][i][3] = 0.f;
    }
  }
};

// Lists rows tile * ROWS .. of those that the sequences order[first:last] bring, few each, into `rows`: by warp 0.
template <class Tile>
__device__ __forceinline__ bool list_rows(const Attention<Tile>& a, int first, int last, int tile) {
  const PrefixAttentionLaunch& p = a.p;
  if (a.warp == 0) {
    for (int i = a.lane; i < Tile::ROWS; i += 32) a.rows[i] = -1;
    __syncwarp();
    int before = -tile * Tile::ROWS;
    for (int i = first; i < last; i += 32) {
      const int n = i + a.lane < last ? p.order[i + a.lane] : -1;
      int count = n < 0 ? 0 : new_tokens(p, n);
      if (count >= MANY) count = 0;
      const int end = running_sum(count, a.lane);
      for (int j = 0; j < count; ++j) {
        const int place = before + end - count + j;
        if (place >= 0 && place < Tile::ROWS) a.rows[place] = p.queries[n] + j;
      }
      before += __shfl_sync(ALL, end, 31);
    }
  }
  __syncthreads();
  return a.rows[0] >= 0;
}

// First launch: grid (runs x run_tiles x run_blocks + N x alone_blocks + T, H).
template <class Tile>
__global__ void __launch_bounds__(THREADS, 2) prefix_attention_parts_kernel(const PrefixAttentionLaunch p) {
  const int of_runs = int(p.runs) * p.run_tiles * p.run_blocks, of_alone = int(p.N) * p.alone_blocks;
  int task = blockIdx.x;
  if (task >= of_runs + of_alone) return append<Tile>(p, task - of_runs - of_alone);

  int first, last, begin, end, tile = 0, split, step;
  if (task < of_runs) {
    split = task % p.run_blocks, step = p.run_blocks, task /= p.run_blocks;
    tile = task % p.run_tiles;
    const int* run = p.shared + 5 * (task / p.run_tiles);
    first = run[0], last = run[1], begin = run[2], end = run[3];
  } else {
    task -= of_runs;
    split = task % p.alone_blocks, step = p.alone_blocks, first = task / p.alone_blocks, last = first + 1;
    const int n = p.order[first];
    begin = p.alone[n], end = first_of_rest(p, n);
  }
  const int count = pieces(begin, end);
  if (split >= count) return;
  Attention<Tile> a(p);
  if (!list_rows(a, first, last, tile)) return;
  const int slot = parts_before(p, first, last, begin);
  a.load_queries([&](int t, int) { return p.rotary && !p.positions ? token_of_row(p, t, sequence_of(p, t)) : 0; });
  const int* table = p.page_table + p.order[first] * p.table_width;
  for (; split < count; split += step) {
    const int from = (begin / int(SPLIT) + split) * int(SPLIT);
    a.attend(table, max(begin, from), min(end, from + int(SPLIT)), end);
    a.store_part(slot + split);
    __syncthreads();  // everybody has left the last tile and the sums of the warps
  }
}

// Second launch: grid (T / ROWS + N, H): as many row tiles as the sequences can have.
template <class Tile>
__global__ void __launch_bounds__(THREADS, 2) prefix_attention_rest_kernel(const PrefixAttentionLaunch p) {
  Attention<Tile> a(p);
  // Which sequence's tile this is: every warp finds it for itself.
  int tile = blockIdx.x, i = 0, found = -1;
  for (; i < p.N && found < 0; i += 32) {
    const int n = i + a.lane < p.N ? p.order[i + a.lane] : -1;
    const int tiles = n < 0 ? 0 : (new_tokens(p, n) + Tile::ROWS - 1) / Tile::ROWS;
    const int end = running_sum(tiles, a.lane), all = __shfl_sync(ALL, end, 31);
    if (tile < all) {
      const int owner = __popc(__ballot_sync(ALL, end <= tile));
      found = i + owner;
      tile -= __shfl_sync(ALL, end - tiles, owner);
    } else {
      tile -= all;
    }
  }
  if (found < 0) return;
  const int n = p.order[found], brought = new_tokens(p, n), row = tile * Tile::ROWS, old = p.lengths[n] - brought;
  const int count = min(brought - row, Tile::ROWS), first_row = p.queries[n] + row;
  for (int r = threadIdx.x; r < Tile::ROWS; r += THREADS) a.rows[r] = r < count ? first_row + r : -1;
  __syncthreads();
  a.load_queries([&](int, int r) { return old + row + r; });
  int begin = 0, parts = 0;
  if (brought < MANY) {
    begin = first_of_rest(p, n);
    parts = parts_before(p, found, found + 1, p.alone[n]) + pieces(p.alone[n], begin);
  }
  a.attend(p.page_table + n * p.table_width, begin, old + row + count, old + row + 1);
  a.merge(parts);
}

}  // namespace limber
