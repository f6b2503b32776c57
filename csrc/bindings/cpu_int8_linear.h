// Bindings of int8_linear on the CPU.
#pragma once
#include "../params/int8_linear.h"
#include "cpu.h"

namespace limber {

inline void bind_int8_linear(py::module_& m) {
  const auto weight = [](int64_t M, int64_t N, int64_t K, const std::string& dtype, uintptr_t packed, uintptr_t scales,
                         int threads) {
    Int8LinearParams p{};
    p.M = M, p.N = N, p.K = K, p.dtype = dtype_from(dtype), p.threads = threads;
    p.packed = pointer<int8_t>(packed), p.scales = pointer<float>(scales);
    return p;
  };
  py::class_<Int8LinearParams>(
      m, "Int8LinearParams",
      "Arguments of the int8_linear kernels; see csrc/params/int8_linear.h. Pointers are integers, 0 for none.",
      py::module_local())
      .def(py::init(weight), py::kw_only(), py::arg("M"), py::arg("N"), py::arg("K"), py::arg("dtype"),
           py::arg("packed"), py::arg("scales"), py::arg("threads"));
  m.def("int8_linear_fwd", [](Int8LinearParams p, uintptr_t x, int64_t x_stride, uintptr_t row_sums, uintptr_t bias,
                              uintptr_t residual, int64_t residual_stride, bool gelu, bool eight_bits,
                              float outlier_threshold, uintptr_t out, uintptr_t preactivation) {
    p.x = pointer<void>(x), p.x_stride = x_stride, p.row_sums = pointer<int32_t>(row_sums);
    p.bias = pointer<float>(bias), p.residual = pointer<void>(residual), p.residual_stride = residual_stride;
    p.gelu = gelu, p.eight_bits = eight_bits, p.outlier_threshold = outlier_threshold;
    p.out = pointer<void>(out), p.preactivation = pointer<void>(preactivation);
    py::gil_scoped_release unlocked;
    int8_linear_fwd(p);
  });
  m.def("int8_linear_bwd", [](Int8LinearParams p, uintptr_t grad, int64_t grad_stride, uintptr_t column_sums,
                              uintptr_t preactivation, uintptr_t d_x) {
    p.grad = pointer<void>(grad), p.grad_stride = grad_stride, p.column_sums = pointer<int32_t>(column_sums);
    p.preactivation = pointer<void>(preactivation), p.d_x = pointer<void>(d_x);
    py::gil_scoped_release unlocked;
    int8_linear_bwd(p);
  });
}

}  // namespace limber
