// Entry points of info_nce on the CPU: the arithmetic that the build and the input's dtype ask for.
#pragma once
#include "info_nce_bwd.h"
#include "info_nce_fwd.h"

namespace limber {

// bf16 products run natively where the instruction set has them; all else is widened to fp32 when packed.
template <class F>
void with_arithmetic([[maybe_unused]] Dtype dtype, F f) {
#if defined(LIMBER_ISA_AVX512)
  if (dtype == Dtype::bf16) return f(BF16{});
#endif
  f(F32{});
}

inline void info_nce_fwd(const InfoNceParams& p) {
  with_arithmetic(p.dtype, [&](auto op) { InfoNceForward<decltype(op)>(p).run(); });
}
inline void info_nce_bwd(const InfoNceParams& p) {
  with_arithmetic(p.dtype, [&](auto op) { InfoNceBackward<decltype(op)>(p).run(); });
}

// Bytes of tile cache worth having for this problem within a budget: all tiles, or as many as fit.
inline int64_t info_nce_cache_bytes(int64_t N, int64_t M, int64_t K, Dtype dtype, int64_t budget) {
  int64_t bytes = 0;
  with_arithmetic(dtype, [&](auto op) {
    using Cache = TileCache<decltype(op)>;
    constexpr int64_t NB = Blocks<decltype(op)>::NB;
    const int64_t all = ceil_div(N, MR) * (ceil_div(M, NB) + ceil_div(K, NB));
    const int64_t fit = (budget - 192) / (Cache::TILE * (int64_t)sizeof(typename Cache::elem) + 4);
    bytes = std::min(all, fit) > 0 ? Cache::bytes_for(std::min(all, fit)) + 64 : 0;
  });
  return bytes;
}

}  // namespace limber
