// Error checking and device selection shared by every launcher.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace limber {

inline void check_cuda(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status) + " (" + cudaGetErrorName(status) +
                           ")");
}

// Errors of the launch itself; those of the running kernel surface at the next synchronisation, as in torch.
inline void check_launch(const char* kernel) { check_cuda(cudaGetLastError(), kernel); }

// One launch with more dynamic shared memory than the 48 KiB that every kernel may have.
template <class Params>
void launch(void (*kernel)(Params), const char* name, dim3 grid, int threads, int shared, void* stream,
            const Params& params) {
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared), name);
  kernel<<<grid, threads, shared, static_cast<cudaStream_t>(stream)>>>(params);
  check_launch(name);
}

inline int multiprocessors(int device) {
  int count = 0;
  check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
  return count;
}

// Selects `device` for this scope. A stream belongs to its device: a launch from another one fails.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check_cuda(cudaGetDevice(&previous_), "cudaGetDevice");
    if (device != previous_) check_cuda(cudaSetDevice(device), "cudaSetDevice");
  }
  ~DeviceGuard() { cudaSetDevice(previous_); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
};

}  // namespace limber
