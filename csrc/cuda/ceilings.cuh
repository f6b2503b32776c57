// Read-bandwidth kernel. Every lane keeps kLoadsInFlight 16-byte loads outstanding (64 bytes a thread, 128 KiB on a
// multiprocessor with 2048 threads): by Little's law more than bandwidth x latency of any device so far.
#pragma once

#include <cstdint>

namespace limber {

constexpr int kReadThreads = 256;
constexpr int kLoadsInFlight = 4;

// source: [vectors] of 16 bytes, split grid-stride, so a warp reads 512 consecutive bytes. partials: [gridDim.x]. The
// sum is what keeps the loads alive; modulo 2^32 it does not depend on the order, so one plain sum on the host checks
// it.
__global__ void __launch_bounds__(kReadThreads)
    read_words_kernel(const uint4* __restrict__ source, std::int64_t vectors, std::uint32_t* __restrict__ partials) {
  const std::int64_t stride = std::int64_t(gridDim.x) * kReadThreads;
  std::int64_t i = std::int64_t(blockIdx.x) * kReadThreads + threadIdx.x;
  std::uint32_t sum = 0;
  for (; i + (kLoadsInFlight - 1) * stride < vectors; i += kLoadsInFlight * stride) {
    uint4 words[kLoadsInFlight];
#pragma unroll
    for (int k = 0; k < kLoadsInFlight; ++k) words[k] = __ldcs(source + i + k * stride);  // streamed: read once
#pragma unroll
    for (int k = 0; k < kLoadsInFlight; ++k) sum += words[k].x + words[k].y + words[k].z + words[k].w;
  }
  for (; i < vectors; i += stride) {
    const uint4 words = __ldcs(source + i);
    sum += words.x + words.y + words.z + words.w;
  }

  __shared__ std::uint32_t warp_sums[kReadThreads / 32];
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
  if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    sum = 0;
    for (int warp = 0; warp < kReadThreads / 32; ++warp) sum += warp_sums[warp];
    partials[blockIdx.x] = sum;
  }
}

}  // namespace limber
