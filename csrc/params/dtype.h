// Element types of the tensors that kernels read and write.
#pragma once
#include <cstdint>

namespace limber {

enum class Dtype : int32_t { f32 = 0, bf16 = 1, f16 = 2, i8 = 3 };

}  // namespace limber
