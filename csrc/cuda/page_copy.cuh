// Copies pages of keys and values, in all layers and with their scales, by one launch. A block owns a tile of
// COPY_TILE vectors of 16 bytes of one page in one layer, its scales behind its keys and values; every lane keeps
// COPIES_IN_FLIGHT loads outstanding, as read_words_kernel does.
#pragma once

#include <cstdint>

#include "params/page_copy.h"

namespace limber {

constexpr int COPY_THREADS = 256, COPIES_IN_FLIGHT = 4, COPY_TILE = COPY_THREADS * COPIES_IN_FLIGHT;

// Grid (layers x tiles, pairs).
__global__ void __launch_bounds__(COPY_THREADS) page_copy_kernel(const PageCopyLaunch p) {
  const int64_t of_page = p.page_bytes / 16, of_scales = p.scale_bytes / 16;
  const int64_t first = blockIdx.x / p.tiles * p.n_pages;  // page of this layer
  const int64_t from = first + p.from[blockIdx.y], to = first + p.to[blockIdx.y];
  const int64_t begin = int64_t(blockIdx.x % p.tiles) * COPY_TILE + threadIdx.x;
  const auto vector = [&](int64_t page, int64_t i) {
    return i < of_page ? static_cast<uint4*>(p.pages) + page * of_page + i
                       : static_cast<uint4*>(p.scales) + page * of_scales + (i - of_page);
  };
  uint4 words[COPIES_IN_FLIGHT];
#pragma unroll
  for (int j = 0; j < COPIES_IN_FLIGHT; ++j) {
    const int64_t i = begin + j * COPY_THREADS;
    if (i < of_page + of_scales) words[j] = *vector(from, i);
  }
#pragma unroll
  for (int j = 0; j < COPIES_IN_FLIGHT; ++j) {
    const int64_t i = begin + j * COPY_THREADS;
    if (i < of_page + of_scales) *vector(to, i) = words[j];
  }
}

}  // namespace limber
