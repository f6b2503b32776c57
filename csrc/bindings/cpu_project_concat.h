// Bindings of project_concat on the CPU.
#pragma once
#include "../params/project_concat.h"
#include "cpu.h"

namespace limber {

inline void bind_project_concat(py::module_& m) {
  const auto projection = [](uintptr_t features, uintptr_t weight, uintptr_t bias, uintptr_t ln_weight,
                             uintptr_t ln_bias, uintptr_t positions, int64_t n_images, int64_t k, int64_t D, int64_t E,
                             int64_t image_stride, int64_t row_stride, int64_t weight_stride, const std::string& dtype,
                             bool dropout, uint32_t threshold, double factor, uint64_t seed, bool layer_norm,
                             double ln_eps, int threads) {
    ProjectConcatParams p{};
    p.features = pointer<void>(features), p.weight = pointer<void>(weight), p.bias = pointer<void>(bias);
    p.ln_weight = pointer<float>(ln_weight), p.ln_bias = pointer<float>(ln_bias);
    p.positions = pointer<int64_t>(positions), p.n_images = n_images, p.k = k, p.D = D, p.E = E;
    p.image_stride = image_stride, p.row_stride = row_stride, p.weight_stride = weight_stride;
    p.dtype = dtype_from(dtype), p.threads = threads;
    p.dropout = dropout, p.threshold = threshold, p.factor = (float)factor, p.seed = seed;
    p.layer_norm = layer_norm, p.ln_eps = ln_eps;
    return p;
  };
  py::class_<ProjectConcatParams>(
      m, "ProjectConcatParams",
      "Arguments of the project_concat kernels; see csrc/params/project_concat.h. Pointers are integers, 0 for none.",
      py::module_local())
      .def(py::init(projection), py::kw_only(), py::arg("features"), py::arg("weight"), py::arg("bias"),
           py::arg("ln_weight"), py::arg("ln_bias"), py::arg("positions"), py::arg("n_images"), py::arg("k"),
           py::arg("D"), py::arg("E"), py::arg("image_stride"), py::arg("row_stride"), py::arg("weight_stride"),
           py::arg("dtype"), py::arg("dropout"), py::arg("threshold"), py::arg("factor"), py::arg("seed"),
           py::arg("layer_norm"), py::arg("ln_eps"), py::arg("threads"));
  m.def("project_concat_fwd", [](ProjectConcatParams p, uintptr_t input_ids, int64_t tokens, int64_t image_token_id,
                                 uintptr_t embedding, int64_t embedding_stride, const std::string& embedding_dtype,
                                 uintptr_t embedding_scales, uintptr_t inputs_embeds) {
    p.input_ids = pointer<int64_t>(input_ids), p.tokens = tokens, p.image_token_id = image_token_id;
    p.embedding = pointer<void>(embedding), p.embedding_stride = embedding_stride;
    p.embedding_dtype = embedding_dtype == "int8" ? Dtype::i8 : dtype_from(embedding_dtype);
    p.embedding_scales = pointer<float>(embedding_scales), p.inputs_embeds = pointer<void>(inputs_embeds);
    py::gil_scoped_release unlocked;
    project_concat_fwd(p);
  });
  m.def("project_concat_bwd", [](ProjectConcatParams p, uintptr_t grad, int64_t S, int64_t batch_stride,
                                 int64_t token_stride, uintptr_t d_features, uintptr_t d_weight, uintptr_t d_bias,
                                 uintptr_t d_ln_weight, uintptr_t d_ln_bias) {
    p.grad = pointer<void>(grad), p.S = S, p.grad_batch_stride = batch_stride, p.grad_token_stride = token_stride;
    p.d_features = pointer<void>(d_features), p.d_weight = pointer<void>(d_weight), p.d_bias = pointer<void>(d_bias);
    p.d_ln_weight = pointer<float>(d_ln_weight), p.d_ln_bias = pointer<float>(d_ln_bias);
    py::gil_scoped_release unlocked;
    project_concat_bwd(p);
  });
}

}  // namespace limber
