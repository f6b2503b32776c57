// What csrc/cuda/ptx.cuh means, on a CPU. Fragments as the PTX ISA lays them out over the lanes.
#pragma once

#include "cuda/emulation.h"

namespace limber::ptx {

inline char* dynamic_shared() { return reinterpret_cast<char*>(emulation::block->shared.get()); }

inline void copy_async(void* to, const void* from, bool filled) {
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % 16) emulation::fail("misaligned copy");
  if (emulation::options.eager) return emulation::land({to, from, filled});
  emulation::thread->open.push_back({to, from, filled});
}
inline void commit_copies() {
  emulation::thread->groups.push_back(std::move(emulation::thread->open));
  emulation::thread->open.clear();
}
template <int PENDING>
void wait_copies() {
  auto& groups = emulation::thread->groups;
  while (groups.size() > PENDING) {
    for (const auto& copy : groups.front()) emulation::land(copy);
    groups.erase(groups.begin());
  }
}

inline uint32_t element(const void* row, int i) {
  uint16_t x;
  std::memcpy(&x, static_cast<const char*>(row) + 2 * i, 2);
  return x;
}
inline void load_matrices(uint32_t (&r)[4], const void* row) {
  const auto rows = emulation::exchange(row);
  const int lane = emulation::thread->lane;
  for (int i = 0; i < 4; ++i) {
    const void* from = rows[8 * i + lane / 4];
    r[i] = element(from, lane % 4 * 2) | element(from, lane % 4 * 2 + 1) << 16;
  }
}
inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  const auto rows = emulation::exchange(row);
  const int lane = emulation::thread->lane;
  for (int i = 0; i < 4; ++i)
    r[i] = element(rows[8 * i + lane % 4 * 2], lane / 4) | element(rows[8 * i + lane % 4 * 2 + 1], lane / 4) << 16;
}

inline float widened(__nv_bfloat16, uint32_t bits) {
  const uint32_t word = bits << 16;
  float x;
  std::memcpy(&x, &word, 4);
  return x;
}
inline float widened(__half, uint32_t bits) { return __half2float(__half(__half_raw{static_cast<unsigned short>(bits)})); }
template <class Element>
void multiply(Element kind, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Operands {
    uint32_t a[4], b[2];
  };
  const auto all = emulation::exchange(Operands{{a[0], a[1], a[2], a[3]}, {b0, b1}});
  const int row = emulation::thread->lane / 4, column = emulation::thread->lane % 4 * 2;
  for (int i = 0; i < 4; ++i) {
    float sum = 0.f;
    for (int k = 0; k < 16; ++k) {
      const int lane = k % 8 / 2, shift = 16 * (k % 2);
      const uint32_t x = all[4 * row + lane].a[i / 2 + (k >= 8 ? 2 : 0)] >> shift;
      const uint32_t y = all[4 * (column + i % 2) + lane].b[k >= 8] >> shift;
      sum += widened(kind, x & 0xffff) * widened(kind, y & 0xffff);
    }
    d[i] += sum;
  }
}

inline float exp2(float x) { return x < -126.f ? 0.f : std::exp2(x); }

}  // namespace limber::ptx
