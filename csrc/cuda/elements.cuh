// 16-bit elements in pairs, and tiles of them in shared memory.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>

namespace limber {

// Offset of a 16-byte chunk in a tile of CHUNKS a row: neighbouring rows lie in other banks.
template <int CHUNKS>
__device__ __forceinline__ int swizzled(int row, int chunk) {
  const int mix = CHUNKS >= 8 ? row & 7 : (row >> 1) & (CHUNKS - 1);
  return (row * CHUNKS + (chunk ^ mix)) * 16;
}

__device__ __forceinline__ float2 widen(__nv_bfloat162 x) { return __bfloat1622float2(x); }
__device__ __forceinline__ float2 widen(__half2 x) { return __half22float2(x); }
template <class Element>
struct Pair;
template <>
struct Pair<__nv_bfloat16> {
  using type = __nv_bfloat162;
  static __device__ __forceinline__ type round(float x, float y) { return __floats2bfloat162_rn(x, y); }
};
template <>
struct Pair<__half> {
  using type = __half2;
  static __device__ __forceinline__ type round(float x, float y) { return __floats2half2_rn(x, y); }
};
template <class To, class From>
__device__ __forceinline__ To same_bits(const From& x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  memcpy(&y, &x, sizeof(y));
  return y;
}

}  // namespace limber
