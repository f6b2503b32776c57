#include "cuda/ceilings.cuh"

#include "cuda/runtime.cuh"
#include "params/ceilings.h"

namespace limber {

namespace {

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check_cuda(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
  return value;
}

}  // namespace

CudaVersions cuda_versions() {
  CudaVersions versions{CUDART_VERSION, 0, 0};
  check_cuda(cudaRuntimeGetVersion(&versions.runtime), "cudaRuntimeGetVersion");
  check_cuda(cudaDriverGetVersion(&versions.driver), "cudaDriverGetVersion");
  return versions;
}

int device_count() {
  int count = 0;
  check_cuda(cudaGetDeviceCount(&count), "cudaGetDeviceCount");
  return count;
}

DeviceProperties device_properties(int device) {
  cudaDeviceProp properties;
  check_cuda(cudaGetDeviceProperties(&properties, device), "cudaGetDeviceProperties");
  return {
      properties.name,
      properties.major,
      properties.minor,
      properties.multiProcessorCount,
      int(properties.sharedMemPerBlockOptin),
      properties.l2CacheSize,
      attribute(cudaDevAttrClockRate, device),  // CUDA 13 dropped both clocks from cudaDeviceProp
      attribute(cudaDevAttrMemoryClockRate, device),
      properties.memoryBusWidth,
      std::int64_t(properties.totalGlobalMem),
  };
}

void read_words(const ReadWordsParams& params) {
  const DeviceGuard guard(params.device);
  read_words_kernel<<<params.blocks, kReadThreads, 0, static_cast<cudaStream_t>(params.stream)>>>(
      static_cast<const uint4*>(params.source), params.bytes / std::int64_t(sizeof(uint4)), params.partials);
  check_launch("read_words_kernel");
}

}  // namespace limber
