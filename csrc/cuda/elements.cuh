// 16-bit elements in pairs, and tiles of them in shared memory.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

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

// Two of the four int8 of a word as 16-bit elements, exactly. BYTES names them as a selector of __byte_perm with a 4 at
// the upper half of each element: 0x4140 is bytes 0 and 1.
template <class Element, int BYTES>
__device__ __forceinline__ uint32_t integers(uint32_t word) {
  using Two = typename Pair<Element>::type;
  if constexpr (std::is_same_v<Element, __nv_bfloat16>) {
    const uint32_t digits = __byte_perm(word & 0x7f7f7f7fu, 0x43434343u, BYTES);  // 128 + the lower 7 bits
    const uint32_t sign = __byte_perm(word & 0x80808080u, 0x43434343u, BYTES);    // 128, or 256 below zero
    return same_bits<uint32_t>(__hsub2(same_bits<Two>(digits), same_bits<Two>(sign)));
  } else {
    const uint32_t raised = __byte_perm(word ^ 0x80808080u, 0x64646464u, BYTES);  // 1024 + 128 + x
    return same_bits<uint32_t>(__hsub2(same_bits<Two>(raised), same_bits<Two>(0x64806480u)));
  }
}
// The largest power of two up to x, of a normal x >= 0; 0 of 0.
__device__ __forceinline__ float power_of_two(float x) {
  return same_bits<float>(same_bits<uint32_t>(x) & 0x7f800000u);
}

}  // namespace limber
