// Entry points of int8_linear on the CPU: y = activation(x W^T + bias) + residual and dx = dy W, W = scales * integers.
#pragma once
#include "int8_linear_bwd.h"
#include "int8_linear_fwd.h"

namespace limber {

inline void int8_linear_fwd(const Int8LinearParams& p) {
  if (p.M) Int8LinearForward(p).run();
}
inline void int8_linear_bwd(const Int8LinearParams& p) {
  if (p.M) Int8LinearBackward(p).run();
}

}  // namespace limber
