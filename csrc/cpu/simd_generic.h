// Compiler vectors of 4 floats: SSE on x86-64-v2, NEON on Arm, plain code elsewhere. The instruction-set floor, kept
// simple.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

namespace limber {

struct simd {
  typedef float vec __attribute__((vector_size(16)));
  typedef int32_t mask __attribute__((vector_size(16)));
  static constexpr int W = 4;
  static constexpr int MR =
      4;  // 8 accumulators: without FMA each product and each broadcast needs a register of its own
  static constexpr const char* name = "baseline";

  static vec zero() { return vec{}; }
  static vec set1(float x) { return vec{x, x, x, x}; }
  static vec load(const float* p) { return *(const vec*)p; }
  static vec loadu(const float* p) {
    vec v;
    std::memcpy(&v, p, 16);
    return v;
  }
  static void store(float* p, vec v) { *(vec*)p = v; }
  static void storeu(float* p, vec v) { std::memcpy(p, &v, 16); }
  static vec add(vec a, vec b) { return a + b; }
  static vec sub(vec a, vec b) { return a - b; }
  static vec mul(vec a, vec b) { return a * b; }
  static vec div(vec a, vec b) { return a / b; }
  static vec fma(vec a, vec b, vec c) { return a * b + c; }
  static vec fms(vec a, vec b, vec c) { return a * b - c; }
  static vec max(vec a, vec b) { return a > b ? a : b; }
  static vec min(vec a, vec b) { return a < b ? a : b; }
  static vec abs(vec a) { return (vec)((mask)a & 0x7fffffff); }
  static vec round(vec a) {
    vec r;
    for (int i = 0; i < W; i++) r[i] = __builtin_rintf(a[i]);
    return r;
  }
  static vec ldexp(vec p, vec n) {
    n = n < set1(128.f) ? n : set1(128.f);
    n = n > set1(-127.f) ? n : set1(-127.f);
    return p * (vec)((__builtin_convertvector(n, mask) + 127) << 23);
  }
  static float sum(vec v) { return (v[0] + v[2]) + (v[1] + v[3]); }
  static float hmax(vec v) {
    float a = v[0] > v[1] ? v[0] : v[1], b = v[2] > v[3] ? v[2] : v[3];
    return a > b ? a : b;
  }
  static float hmin(vec v) {
    float a = v[0] < v[1] ? v[0] : v[1], b = v[2] < v[3] ? v[2] : v[3];
    return a < b ? a : b;
  }

  static constexpr mask iota = {0, 1, 2, 3};
  static int clamp(int64_t n) { return n < -1 ? -1 : n > W ? W : (int)n; }
  static mask first(int64_t n) { return iota < clamp(n); }
  static mask lane(int64_t d) { return iota == clamp(d); }
  static mask eq(const int32_t* p, int32_t key, mask m) {
    mask r;
    for (int i = 0; i < W; i++) r[i] = m[i] && p[i] == key ? -1 : 0;
    return r;
  }
  static mask less(vec a, vec b) { return a < b; }
  static mask andnot(mask a, mask b) { return a & ~b; }
  static mask either(mask a, mask b) { return a | b; }
  static int count(mask m) { return -(m[0] + m[1] + m[2] + m[3]); }
  static vec select(mask m, vec a, vec b) { return m ? a : b; }

  static vec load_i8(const int8_t* p) { return vec{(float)p[0], (float)p[1], (float)p[2], (float)p[3]}; }
  static vec load_first(const float* p, int64_t n) {
    if (n >= W) return loadu(p);
    vec v{};
    for (int64_t i = 0; i < n; i++) v[i] = p[i];
    return v;
  }
  static void store_first(float* p, vec v, int64_t n) {
    if (n >= W) return storeu(p, v);
    for (int64_t i = 0; i < n; i++) p[i] = v[i];
  }

  static float bits(uint32_t u) {
    float f;
    std::memcpy(&f, &u, 4);
    return f;
  }
  static uint32_t bits(float f) {
    uint32_t u;
    std::memcpy(&u, &f, 4);
    return u;
  }
  static float from_f16(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, e = h >> 10 & 31, m = h & 1023;
    if (e == 31) return bits(sign | 0x7f800000 | m << 13);
    if (e == 0) return bits(sign | bits((float)m * 0x1p-24f));
    return bits(sign | (e + 112) << 23 | m << 13);
  }
  static uint16_t to_f16(float f) {  // round to nearest even
    uint32_t u = bits(f), sign = u >> 16 & 0x8000, a = u & 0x7fffffff;
    if (a > 0x7f800000) return (uint16_t)(sign | 0x7e00);
    if (a >= 0x477ff000) return (uint16_t)(sign | 0x7c00);
    if (a < 0x38800000) return (uint16_t)(sign | (uint32_t)__builtin_rintf(bits(a) * 0x1p24f));
    return (uint16_t)(sign | ((a + 0xfff + (a >> 13 & 1)) - 0x38000000) >> 13);
  }
  static uint16_t to_bf16(float f) {
    uint32_t u = bits(f);
    return f != f ? 0x7fc0 : (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
  }
  static vec load_bf16(const uint16_t* p, int64_t n) {
    vec v{};
    for (int64_t i = 0; i < n && i < W; i++) v[i] = bits((uint32_t)p[i] << 16);
    return v;
  }
  static vec load_f16(const uint16_t* p, int64_t n) {
    vec v{};
    for (int64_t i = 0; i < n && i < W; i++) v[i] = from_f16(p[i]);
    return v;
  }
  static void store_bf16(uint16_t* p, vec v, int64_t n) {
    for (int64_t i = 0; i < n && i < W; i++) p[i] = to_bf16(v[i]);
  }
  static void store_f16(uint16_t* p, vec v, int64_t n) {
    for (int64_t i = 0; i < n && i < W; i++) p[i] = to_f16(v[i]);
  }

  static void transpose(vec v[W]) {
    vec a = __builtin_shuffle(v[0], v[1], mask{0, 4, 1, 5}), b = __builtin_shuffle(v[0], v[1], mask{2, 6, 3, 7});
    vec c = __builtin_shuffle(v[2], v[3], mask{0, 4, 1, 5}), d = __builtin_shuffle(v[2], v[3], mask{2, 6, 3, 7});
    v[0] = __builtin_shuffle(a, c, mask{0, 1, 4, 5});
    v[1] = __builtin_shuffle(a, c, mask{2, 3, 6, 7});
    v[2] = __builtin_shuffle(b, d, mask{0, 1, 4, 5});
    v[3] = __builtin_shuffle(b, d, mask{2, 3, 6, 7});
  }
};

}  // namespace limber
