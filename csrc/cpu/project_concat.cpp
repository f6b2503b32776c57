// Entry points of project_concat on the CPU: the arithmetic that the build and the inputs ask for.
#include "project_concat_bwd.h"
#include "project_concat_fwd.h"

namespace limber {

// AMX tiles multiply fp32 and fp16 in parts where there are enough rows, and F32 once more what was not finite.
template <class F>
void with_finite_arithmetic([[maybe_unused]] const ProjectConcatParams& p, F f) {
#if defined(LIMBER_ISA_AMX)
  if (p.dtype != Dtype::bf16 && prompt_rows(p) > 16 && p.D >= 16 && with_split(p.dtype, f)) return;
#endif
  with_arithmetic(p.dtype, f);
}

void project_concat_fwd(const ProjectConcatParams& p) {
  with_finite_arithmetic(p, [&](auto op) { return ProjectConcatForward<decltype(op)>(p).run(); });
}
void project_concat_bwd(const ProjectConcatParams& p) {
  with_finite_arithmetic(p, [&](auto op) { return ProjectConcatBackward<decltype(op)>(p).run(); });
}

}  // namespace limber
