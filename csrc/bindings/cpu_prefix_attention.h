// Bindings of prefix_attention on the CPU.
#pragma once
#include "../params/prefix_attention.h"
#include "cpu.h"

namespace limber {

inline void bind_prefix_attention(py::module_& m) {
  m.def(
      "prefix_attention_fwd",
      [](uintptr_t q, uintptr_t k, uintptr_t v, int64_t q_stride, int64_t k_stride, int64_t v_stride, uintptr_t pages,
         int64_t page_stride, uintptr_t page_scales, int64_t page_scales_stride, int64_t T, int64_t N, int64_t H,
         int64_t D, int64_t page_size, const std::string& dtype, uintptr_t queries, uintptr_t lengths,
         uintptr_t page_table, int64_t table_width, uintptr_t order, uintptr_t shared, int64_t runs, uintptr_t alone,
         uintptr_t positions, uintptr_t rotary, int64_t rotary_dims, float scale, int threads, uintptr_t out) {
        PrefixAttentionParams p{};
        p.q = pointer<void>(q), p.k = pointer<void>(k), p.v = pointer<void>(v);
        p.q_stride = q_stride, p.k_stride = k_stride, p.v_stride = v_stride;
        p.pages = pointer<void>(pages), p.page_stride = page_stride;
        p.page_scales = pointer<float>(page_scales), p.page_scales_stride = page_scales_stride;
        p.T = T, p.N = N, p.H = H, p.D = D, p.page_size = page_size, p.dtype = dtype_from(dtype);
        p.page_dtype = page_scales ? Dtype::i8 : p.dtype;
        p.queries = pointer<int32_t>(queries), p.lengths = pointer<int32_t>(lengths);
        p.page_table = pointer<int32_t>(page_table), p.table_width = table_width;
        p.order = pointer<int32_t>(order), p.shared = pointer<int32_t>(shared), p.runs = runs;
        p.alone = pointer<int32_t>(alone), p.positions = pointer<int32_t>(positions);
        p.rotary = pointer<float>(rotary), p.rotary_dims = rotary_dims;
        p.scale = scale, p.threads = threads, p.out = pointer<void>(out);
        py::gil_scoped_release unlocked;
        prefix_attention_fwd(p);
      },
      py::kw_only(), py::arg("q"), py::arg("k"), py::arg("v"), py::arg("q_stride"), py::arg("k_stride"),
      py::arg("v_stride"), py::arg("pages"), py::arg("page_stride"), py::arg("page_scales"),
      py::arg("page_scales_stride"), py::arg("T"), py::arg("N"), py::arg("H"), py::arg("D"), py::arg("page_size"),
      py::arg("dtype"), py::arg("queries"), py::arg("lengths"), py::arg("page_table"), py::arg("table_width"),
      py::arg("order"), py::arg("shared"), py::arg("runs"), py::arg("alone"), py::arg("positions"), py::arg("rotary"),
      py::arg("rotary_dims"), py::arg("scale"), py::arg("threads"), py::arg("out"),
      "See csrc/params/prefix_attention.h. Pointers are integers, 0 for none.");
}

}  // namespace limber
