// Bindings of frozen_cross_entropy on the CPU.
#pragma once
#include "../params/frozen_cross_entropy.h"
#include "cpu.h"

namespace limber {

inline void bind_frozen_cross_entropy(py::module_& m) {
  const auto rows = [](int64_t M, int64_t D, const std::string& dtype, uintptr_t labels, int64_t ignore_index,
                       uintptr_t d_hidden, int threads) {
    FrozenCrossEntropyParams p{};
    p.M = M, p.D = D, p.dtype = dtype_from(dtype), p.threads = threads;
    p.labels = pointer<int64_t>(labels), p.ignore_index = ignore_index, p.d_hidden = pointer<void>(d_hidden);
    return p;
  };
  py::class_<FrozenCrossEntropyParams>(m, "FrozenCrossEntropyParams",
                                       "Arguments of the frozen_cross_entropy kernels; see "
                                       "csrc/params/frozen_cross_entropy.h. Pointers are integers, 0 for none.",
                                       py::module_local())
      .def(py::init(rows), py::kw_only(), py::arg("M"), py::arg("D"), py::arg("dtype"), py::arg("labels"),
           py::arg("ignore_index"), py::arg("d_hidden"), py::arg("threads"));
  m.def("frozen_cross_entropy_fwd", [](FrozenCrossEntropyParams p, uintptr_t hidden, int64_t hidden_stride, int64_t V,
                                       uintptr_t packed, uintptr_t scales, uintptr_t row_sums, uintptr_t column_sums,
                                       uintptr_t bias, uintptr_t losses) {
    p.hidden = pointer<void>(hidden), p.hidden_stride = hidden_stride, p.V = V, p.packed = pointer<int8_t>(packed);
    p.scales = pointer<float>(scales), p.row_sums = pointer<int32_t>(row_sums);
    p.column_sums = pointer<int32_t>(column_sums), p.bias = pointer<float>(bias), p.losses = pointer<float>(losses);
    py::gil_scoped_release unlocked;
    frozen_cross_entropy_fwd(p);
  });
  m.def("frozen_cross_entropy_bwd", [](FrozenCrossEntropyParams p, uintptr_t gradient, uintptr_t d_losses) {
    p.gradient = pointer<void>(gradient), p.d_losses = pointer<float>(d_losses);
    py::gil_scoped_release unlocked;
    frozen_cross_entropy_bwd(p);
  });
}

}  // namespace limber
