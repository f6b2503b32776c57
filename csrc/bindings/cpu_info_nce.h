// Bindings of info_nce on the CPU.
#pragma once
#include "../params/info_nce.h"
#include "cpu.h"

namespace limber {

inline void bind_info_nce(py::module_& m) {
  const auto common = [](uintptr_t image, uintptr_t text, uintptr_t extra, int64_t N, int64_t M, int64_t K, int64_t D,
                         int64_t image_stride, int64_t text_stride, int64_t extra_stride, const std::string& dtype,
                         double scale, double bias, double label_smoothing, bool normalize, bool sigmoid, bool columns,
                         int threads, uintptr_t labels, uintptr_t image_ids, uintptr_t text_ids, uintptr_t row_state,
                         uintptr_t col_state, uintptr_t cache, int64_t cache_bytes) {
    InfoNceParams p{};
    p.image = pointer<void>(image), p.text = pointer<void>(text), p.extra = pointer<void>(extra);
    p.N = N, p.M = M, p.K = K, p.D = D;
    p.image_stride = image_stride, p.text_stride = text_stride, p.extra_stride = extra_stride;
    p.dtype = dtype_from(dtype);
    p.scale = scale, p.bias = bias, p.label_smoothing = label_smoothing;
    p.normalize = normalize, p.sigmoid = sigmoid, p.columns = columns, p.threads = threads;
    p.labels = pointer<int32_t>(labels), p.image_ids = pointer<int32_t>(image_ids),
    p.text_ids = pointer<int32_t>(text_ids);
    p.row_state = pointer<float>(row_state), p.col_state = pointer<float>(col_state);
    p.cache = pointer<void>(cache), p.cache_bytes = cache_bytes;
    return p;
  };
  py::class_<InfoNceParams>(
      m, "InfoNceParams",
      "Arguments of the InfoNCE kernels; see csrc/params/info_nce.h. Pointers are integers, 0 for none.",
      py::module_local())
      .def(py::init(common), py::kw_only(), py::arg("image"), py::arg("text"), py::arg("extra"), py::arg("N"),
           py::arg("M"), py::arg("K"), py::arg("D"), py::arg("image_stride"), py::arg("text_stride"),
           py::arg("extra_stride"), py::arg("dtype"), py::arg("scale"), py::arg("bias"), py::arg("label_smoothing"),
           py::arg("normalize"), py::arg("sigmoid"), py::arg("columns"), py::arg("threads"), py::arg("labels"),
           py::arg("image_ids"), py::arg("text_ids"), py::arg("row_state"), py::arg("col_state"), py::arg("cache"),
           py::arg("cache_bytes"));
  m.def("info_nce_fwd", [](InfoNceParams p, uintptr_t row_correct, uintptr_t col_correct) {
    p.row_correct = pointer<uint8_t>(row_correct), p.col_correct = pointer<uint8_t>(col_correct);
    py::gil_scoped_release unlocked;
    info_nce_fwd(p);
  });
  m.def("info_nce_bwd", [](InfoNceParams p, uintptr_t row_grad, uintptr_t col_grad, uintptr_t d_image, uintptr_t d_text,
                           uintptr_t d_extra) {
    p.row_grad = pointer<float>(row_grad), p.col_grad = pointer<float>(col_grad);
    p.d_image = pointer<void>(d_image), p.d_text = pointer<void>(d_text), p.d_extra = pointer<void>(d_extra);
    py::gil_scoped_release unlocked;
    info_nce_bwd(p);
  });
  m.def("info_nce_total", [](uintptr_t row, int64_t n, uintptr_t col, int64_t m) {
    double total = 0;  // in this order whatever the number of threads
    for (int64_t i = 0; i < n; i++) total += pointer<float>(row)[i];
    for (int64_t j = 0; j < m; j++) total += pointer<float>(col)[j];
    return total;
  });
}

}  // namespace limber
