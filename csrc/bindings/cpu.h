// pybind11 bindings of the CPU kernels: raw pointers, sizes and strides. One source per op, so that they compile side
// by side.
#pragma once
#include <pybind11/pybind11.h>

#include "../params/dtype.h"

namespace py = pybind11;

namespace limber {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

inline Dtype dtype_from(const std::string& name) {
  if (name == "float32") return Dtype::f32;
  if (name == "bfloat16") return Dtype::bf16;
  if (name == "float16") return Dtype::f16;
  throw py::value_error("dtype must be float32, bfloat16 or float16; got " + name);
}

void bind_frozen_cross_entropy(py::module_& m);
void bind_info_nce(py::module_& m);
void bind_int8_linear(py::module_& m);
void bind_prefix_attention(py::module_& m);
void bind_project_concat(py::module_& m);

}  // namespace limber
