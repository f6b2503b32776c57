// What a device can do at most: its properties, and a kernel that does nothing but read.
#pragma once

#include <cstdint>
#include <string>

namespace limber {

struct DeviceProperties {
  std::string name;
  int major, minor;  // compute capability
  int multiprocessors;
  int shared_memory_bytes;  // per block, opted in
  int l2_bytes;
  int clock_khz;
  int memory_clock_khz;
  int memory_bus_bits;
  std::int64_t memory_bytes;
};

struct CudaVersions {
  int compiler, runtime, driver;  // 1000 * major + 10 * minor; driver 0 where there is none
};

struct ReadWordsParams {
  const void* source;       // [bytes], 16-byte aligned
  std::int64_t bytes;       // a multiple of 16
  std::uint32_t* partials;  // [blocks] out: the 32-bit words of source, summed modulo 2^32, one part per block
  int blocks;
  int device;
  void* stream;  // cudaStream_t; null is the legacy default stream
};

CudaVersions cuda_versions();
int device_count();
DeviceProperties device_properties(int device);
void read_words(const ReadWordsParams& params);

}  // namespace limber
