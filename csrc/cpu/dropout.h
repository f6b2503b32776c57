// The dropout mask as a function of (seed, row, column): nothing is stored, every element can be made anew anywhere.
//
// 64 bits of a row, mixed from the seed and its number, key a 32-bit mix of the column; an element is dropped where its
// word lies below the threshold. limber_fast/reference/project_concat.py defines the same words, and tests hold every
// backend to them.
#pragma once
#include <cstdint>

namespace limber {

class Dropout {
 public:
  struct Key {
    uint32_t low, high;
  };
  Dropout(uint64_t seed, uint32_t threshold) : start_(mix64(seed + STEP)), threshold_(threshold) {}

  Key key(int64_t row) const {
    const uint64_t z = mix64(start_ + (uint64_t)(row + 1) * STEP);
    return {(uint32_t)z, (uint32_t)(z >> 32)};
  }
  // out[i] = 0 where column + i of the row is dropped, else `value`. Plain loops: compilers turn them into vectors of
  // any instruction set.
  template <int N>
  void factors(Key key, int64_t column, float value, float* out) const {
    for (int i = 0; i < N; i++) {
      uint32_t x = (uint32_t)column + (uint32_t)i + key.low;
      x = (x ^ x >> 16) * 0x7feb352du;
      x = (x ^ x >> 15) + key.high;
      x *= 0x846ca68bu;
      out[i] = (x ^ x >> 16) >= threshold_ ? value : 0.f;
    }
  }

 private:
  static constexpr uint64_t STEP = 0x9e3779b97f4a7c15u;
  static uint64_t mix64(uint64_t z) {
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
  }
  uint64_t start_;
  uint32_t threshold_;
};

}  // namespace limber
