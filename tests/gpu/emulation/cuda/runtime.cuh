// What csrc/cuda/runtime.cuh means, on a CPU.
#pragma once

#include <dlfcn.h>

#include "cuda/emulation.h"

namespace limber {

template <class Params>
void launch(void (*kernel)(Params), const char*, dim3 grid, int threads, int shared, void*, const Params& params) {
  if (emulation::options.elsewhere) {
    Dl_info symbol;
    if (!dladdr(reinterpret_cast<void*>(kernel), &symbol) || !symbol.dli_sname) emulation::fail("a kernel has no name");
    return emulation::options.elsewhere(symbol.dli_sname, grid.x, grid.y, threads, shared, &params,
                                        sizeof(params));
  }
  emulation::launch(grid, threads, shared, [&] { kernel(params); });
}

inline int multiprocessors(int) { return 1; }  // few, so that a block takes several splits

struct DeviceGuard {
  explicit DeviceGuard(int) {}
};

}  // namespace limber
