// Entry points of project_concat on the CPU: the arithmetic that the build and the input's dtype ask for.
#pragma once
#include "project_concat_bwd.h"
#include "project_concat_fwd.h"

namespace limber {

inline void project_concat_fwd(const ProjectConcatParams& p) {
  with_arithmetic(p.dtype, [&](auto op) { ProjectConcatForward<decltype(op)>(p).run(); });
}
inline void project_concat_bwd(const ProjectConcatParams& p) {
  with_arithmetic(p.dtype, [&](auto op) { ProjectConcatBackward<decltype(op)>(p).run(); });
}

}  // namespace limber
