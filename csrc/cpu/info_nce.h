// Entry points of info_nce on the CPU: the arithmetic that the build and the input's dtype ask for.
#pragma once
#include "info_nce_bwd.h"
#include "info_nce_fwd.h"

namespace limber {

// bf16 products run natively where the instruction set has them; all else is widened to fp32 when packed.
template <class F>
void with_arithmetic([[maybe_unused]] Dtype dtype, F f) {
#if defined(LIMBER_BF16_PAIRS)
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

}  // namespace limber
