// Entry points of info_nce on the CPU: the arithmetic that the build and the input's dtype ask for.
#pragma once
#include "info_nce_bwd.h"
#include "info_nce_fwd.h"

namespace limber {

inline void info_nce_fwd(const InfoNceParams& p) {
  with_arithmetic(p.dtype, [&](auto op) { InfoNceForward<decltype(op)>(p).run(); });
}
inline void info_nce_bwd(const InfoNceParams& p) {
  with_arithmetic(p.dtype, [&](auto op) { InfoNceBackward<decltype(op)>(p).run(); });
}

}  // namespace limber
