// Arguments of a copy of whole pages in all layers: what the first write of a fork into a shared page needs.
#pragma once
#include <cstdint>

namespace limber {

struct PageCopyParams {
  void* pages;   // [layers, n_pages, page_bytes]
  void* scales;  // [layers, n_pages, scale_bytes] of int8 pages, else null and scale_bytes 0
  int64_t layers, n_pages;
  int64_t page_bytes, scale_bytes;  // of one page in one layer, multiples of 16
  const int32_t* pairs;             // [count, 2] (from, to), in the host's memory; no page is both read and written
  int64_t count;
  int32_t device;
  void* stream;
};
void page_copy_cuda(const PageCopyParams& p);

// What one launch is told. The pairs travel by value: nothing is copied to the device first, nothing waits for that.
struct PageCopyLaunch : PageCopyParams {
  static constexpr int64_t PAIRS = 256;
  int32_t tiles;  // blocks of a page in one layer
  int32_t from[PAIRS], to[PAIRS];
};

}  // namespace limber
