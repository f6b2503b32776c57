#include "cuda/page_copy.cuh"

#include <algorithm>

#include "cuda/runtime.cuh"

namespace limber {

void page_copy_cuda(const PageCopyParams& p) {
  if (!p.count || !p.layers) return;
  const DeviceGuard guard(p.device);
  PageCopyLaunch launched{p};
  launched.tiles = int32_t(((p.page_bytes + p.scale_bytes) / 16 + COPY_TILE - 1) / COPY_TILE);
  for (int64_t done = 0; done < p.count; done += PageCopyLaunch::PAIRS) {
    const int64_t pairs = std::min(p.count - done, PageCopyLaunch::PAIRS);
    for (int64_t i = 0; i < pairs; ++i) {
      launched.from[i] = p.pairs[2 * (done + i)];
      launched.to[i] = p.pairs[2 * (done + i) + 1];
    }
    launch(page_copy_kernel, "page_copy_kernel", dim3(unsigned(p.layers * launched.tiles), unsigned(pairs)),
           COPY_THREADS, 0, p.stream, launched);
  }
}

}  // namespace limber
