// Arguments of paged attention: pointers, sizes, strides in elements. No torch, no ownership.
//
// T new tokens of N sequences; sequence n brings rows queries[n] .. queries[n + 1] - 1, its newest tokens. Token j of a
// sequence lies in place j % page_size of page page_table[n][j / page_size]; a page is [H][2][page_size][D], K then V.
// In int8 a key or value is its integers times a scale of its own, absmax / 127.
#pragma once
#include "dtype.h"

namespace limber {

struct PrefixAttentionParams {
  const void *q, *k, *v;  // [T, H, D], contiguous but for their row strides
  int64_t q_stride, k_stride, v_stride;
  void* pages;
  int64_t page_stride;
  float* page_scales;  // of int8 pages: a page is [H][2][page_size]; else null
  int64_t page_scales_stride;
  int64_t T, N, H, D, page_size;
  Dtype dtype;       // of q, k, v and out
  Dtype page_dtype;  // dtype, or i8

  const int32_t* queries;     // [N + 1]
  const int32_t* lengths;     // [N] tokens, the new ones included
  const int32_t* page_table;  // [N, table_width]
  int64_t table_width;
  const int32_t* order;   // [N] the sequences so that members of a shared run are neighbours
  const int32_t* shared;  // [runs, 5] (first, last, begin, end, depth): order[first:last] share tokens begin .. end-1
  int64_t runs;           //
  const int32_t* alone;   // [N] first token that a sequence reads alone
  const int32_t* positions;  // [T] rotary positions, or null: a token's index
  const float* rotary;       // [positions, rotary_dims] cos and sin of each pair, or null
  int64_t rotary_dims;
  float scale;
  int threads;
  void* out;  // [T, H, D]
};

// What the CUDA kernels are told besides. Everything that changes between replays of a graph lies behind pointers.
struct PrefixAttentionLaunch : PrefixAttentionParams {
  static constexpr int64_t SPLIT = 256;  // tokens of a part
  void* part_sums;                       // [T, H, slots, D] fp16, weights times V over the part's scale
  float* part_heads;                     // [T, H, slots, 4] largest logit, sum of the weights, scale, unused
  int64_t slots;                         // parts that a row can have, prefix_attention_slots
  int32_t page_shift;                    // page_size = 1 << page_shift
  int32_t run_tiles, run_blocks;         // blocks of a run of shared tokens: row tiles, splits side by side
  int32_t alone_blocks;                  // blocks of a sequence's own cached tokens
  int32_t device;
  void* stream;
};

// A row has a part per SPLIT tokens, and one more per run of shared tokens that ends within: `depth` runs at most.
inline int64_t prefix_attention_slots(int64_t table_width, int64_t page_size, int64_t depth) {
  return (table_width * page_size + PrefixAttentionLaunch::SPLIT - 1) / PrefixAttentionLaunch::SPLIT + depth;
}
void prefix_attention_cuda(PrefixAttentionLaunch p);

// Of the CPU: csrc/cpu/prefix_attention.cpp.
void prefix_attention_fwd(const PrefixAttentionParams& p);

}  // namespace limber
