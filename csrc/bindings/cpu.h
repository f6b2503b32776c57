// pybind11 bindings of the CPU kernels: raw pointers, sizes and strides. One header per op, one source
// for all: pybind11 alone takes 5 s to compile, as long as most kernels.
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

}  // namespace limber
