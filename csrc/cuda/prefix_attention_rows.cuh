// The rows that sequences bring: where their tokens lie, which parts they have, their rotary, and the append of new
// keys and values to the pages.
#pragma once

#include <cfloat>

#include "cuda/elements.cuh"
#include "params/prefix_attention.h"

namespace limber {

constexpr int WARPS = 4, THREADS = 32 * WARPS;
constexpr int MANY = 16;  // new tokens from which on a sequence is a prefill
constexpr int64_t SPLIT = PrefixAttentionLaunch::SPLIT;
constexpr unsigned ALL = 0xffffffffu;

// Dimensions 8 chunk .. 8 chunk + 7 of a row, those below `dims` turned pair by pair.
template <class Element>
__device__ __forceinline__ uint4 rotated(uint4 x, int chunk, const float* angles, int dims) {
  using Two = typename Pair<Element>::type;
  if (8 * chunk >= dims) return x;
  uint32_t words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int d = 8 * chunk + 2 * i;
    if (d >= dims) continue;
    const float2 turn = *reinterpret_cast<const float2*>(angles + d), pair = widen(same_bits<Two>(words[i]));
    words[i] =
        same_bits<uint32_t>(Pair<Element>::round(pair.x * turn.x - pair.y * turn.y, pair.y * turn.x + pair.x * turn.y));
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}
__device__ __forceinline__ const float* angles_of(const PrefixAttentionLaunch& p, int64_t row, int64_t token) {
  return p.rotary ? p.rotary + (p.positions ? p.positions[row] : token) * p.rotary_dims : nullptr;
}
__device__ __forceinline__ int rotary_dims(const PrefixAttentionLaunch& p) { return p.rotary ? int(p.rotary_dims) : 0; }

__device__ __forceinline__ int new_tokens(const PrefixAttentionLaunch& p, int n) {
  return p.queries[n + 1] - p.queries[n];
}

__device__ __forceinline__ int sum_of_warp(int x) {
#pragma unroll
  for (int d = 16; d; d >>= 1) x += __shfl_xor_sync(ALL, x, d);
  return x;
}
// Sum over the lanes up to this one.
__device__ __forceinline__ int running_sum(int x, int lane) {
#pragma unroll
  for (int d = 1; d < 32; d <<= 1) {
    const int before = __shfl_up_sync(ALL, x, d);
    if (lane >= d) x += before;
  }
  return x;
}

// Blocks of SPLIT positions that tokens begin .. end-1 meet.
__device__ __forceinline__ int pieces(int begin, int end) {
  return end > begin ? (end - 1) / int(SPLIT) - begin / int(SPLIT) + 1 : 0;
}
// Parts that runs leave of the tokens before `begin` of the sequences order[first:last]. By a whole warp.
__device__ __forceinline__ int parts_before(const PrefixAttentionLaunch& p, int first, int last, int begin) {
  int count = 0;
  for (int r = threadIdx.x % 32; r < p.runs; r += 32) {
    const int* run = p.shared + 5 * r;
    if (run[0] <= first && last <= run[1] && run[3] <= begin) count += pieces(run[2], run[3]);
  }
  return sum_of_warp(count);
}
// First of the tokens that the second launch reads of a sequence of few new tokens.
__device__ __forceinline__ int first_of_rest(const PrefixAttentionLaunch& p, int n) {
  const int old = p.lengths[n] - new_tokens(p, n);
  return max(p.alone[n], old / int(SPLIT) * int(SPLIT));
}

// Sequence that brings row t.
__device__ __forceinline__ int sequence_of(const PrefixAttentionLaunch& p, int t) {
  int low = 0, high = int(p.N);
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (p.queries[middle] <= t ? low : high) = middle;
  }
  return low;
}
__device__ __forceinline__ int token_of_row(const PrefixAttentionLaunch& p, int t, int n) {
  return p.lengths[n] - (p.queries[n + 1] - t);
}

// A row in int8, by a warp whose lanes bring 8 elements each, or zeros: this lane's integers, and the scale: absmax /
// 127, or 0 where that is no normal number. Of a row that is not finite NaN, and zeros.
template <class Element>
__device__ __forceinline__ uint2 in_int8(uint4 row, float& scale) {
  using Two = typename Pair<Element>::type;
  const uint32_t words[4] = {row.x, row.y, row.z, row.w};
  float x[8];
  uint32_t most = 0;  // of magnitudes as integers: NaN is larger than infinity, and that than any number
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = widen(same_bits<Two>(words[i]));
    x[2 * i] = pair.x, x[2 * i + 1] = pair.y;
    most = max(most, max(same_bits<uint32_t>(fabsf(pair.x)), same_bits<uint32_t>(fabsf(pair.y))));
  }
#pragma unroll
  for (int d = 16; d; d >>= 1) most = max(most, __shfl_xor_sync(ALL, most, d));
  const bool finite = most < same_bits<uint32_t>(INFINITY);
  scale = finite ? same_bits<float>(most) / 127.f : NAN;
  if (scale < FLT_MIN) scale = 0.f;
  const float divisor = scale > 0.f ? scale : 1.f;
  uint32_t bytes[2] = {};
#pragma unroll
  for (int i = 0; i < 8; ++i)
    if (finite) bytes[i / 4] |= (uint32_t(int(rintf(x[i] / divisor))) & 0xff) << (8 * (i % 4));
  return make_uint2(bytes[0], bytes[1]);
}

// Rotates the new keys of one row of all heads and writes them and the values to their places: a warp a head.
template <class Tile>
__device__ __forceinline__ void append(const PrefixAttentionLaunch& p, int t) {
  using Element = typename Tile::Element;
  using Stored = typename Tile::Stored;
  constexpr int D = Tile::D;
  static_assert(D <= 8 * 32);
  const int n = sequence_of(p, t), token = token_of_row(p, t, n), chunk = threadIdx.x % 32;
  const bool there = chunk < Tile::CHUNKS;
  const float* angles = angles_of(p, t, token);
  const int64_t page = p.page_table[n * p.table_width + (token >> p.page_shift)];
  const int place = token & ((1 << p.page_shift) - 1), first = blockIdx.y * WARPS + threadIdx.x / 32;
  for (int head = first; head < p.H; head += gridDim.y * WARPS) {
    uint4 key = make_uint4(0, 0, 0, 0), value = key;
    if (there) {
      const int64_t from = int64_t(head) * D + 8 * chunk;
      key = *reinterpret_cast<const uint4*>(static_cast<const Element*>(p.k) + t * p.k_stride + from);
      key = rotated<Element>(key, chunk, angles, rotary_dims(p));
      value = *reinterpret_cast<const uint4*>(static_cast<const Element*>(p.v) + t * p.v_stride + from);
    }
    const int64_t row = (int64_t(2 * head) << p.page_shift) + place, values = int64_t(D) << p.page_shift;
    Stored* to = static_cast<Stored*>(p.pages) + page * p.page_stride + row * D + 8 * chunk;
    if constexpr (Tile::SCALED) {
      float key_scale, value_scale;
      const uint2 key_bytes = in_int8<Element>(key, key_scale), value_bytes = in_int8<Element>(value, value_scale);
      float* scales = p.page_scales + page * p.page_scales_stride + row;
      if (chunk == 0) scales[0] = key_scale, scales[int64_t(1) << p.page_shift] = value_scale;
      if (there) *reinterpret_cast<uint2*>(to) = key_bytes, *reinterpret_cast<uint2*>(to + values) = value_bytes;
    } else if (there) {
      *reinterpret_cast<uint4*>(to) = key, *reinterpret_cast<uint4*>(to + values) = value;
    }
  }
}

}  // namespace limber
