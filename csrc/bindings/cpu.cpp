// pybind11 bindings of the CPU kernels: raw pointers, sizes and strides. Built once per instruction set; see setup.py.
#include <pybind11/pybind11.h>
#if defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "../cpu/ceilings.h"
#include "../cpu/info_nce.h"
#include "../cpu/project_concat.h"

namespace py = pybind11;
using namespace limber;

namespace {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

Dtype dtype_from(const std::string& name) {
  if (name == "float32") return Dtype::f32;
  if (name == "bfloat16") return Dtype::bf16;
  if (name == "float16") return Dtype::f16;
  throw py::value_error("dtype must be float32, bfloat16 or float16; got " + name);
}

py::dict cpu_features() {
  py::dict d;
#if defined(__x86_64__) || defined(__i386__)
  __builtin_cpu_init();
#define LIMBER_FEATURE(name) d[#name] = bool(__builtin_cpu_supports(#name))
  LIMBER_FEATURE(avx2), LIMBER_FEATURE(fma), LIMBER_FEATURE(f16c), LIMBER_FEATURE(avx512f), LIMBER_FEATURE(avx512bw),
      LIMBER_FEATURE(avx512vl), LIMBER_FEATURE(avx512dq);
  LIMBER_FEATURE(avx512vnni), LIMBER_FEATURE(avx512bf16);
#undef LIMBER_FEATURE
  bool amx_tile = false, amx_bf16 = false;
#if defined(__linux__)
  unsigned a, b, c, bits;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &bits)) {
    // Linux hands out tile registers on request, once per process; a kernel without AMX refuses.
    constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
    amx_tile = (bits >> 24 & 1) && syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
    amx_bf16 = amx_tile && (bits >> 22 & 1);
  }
#endif
  d["amx_tile"] = amx_tile, d["amx_bf16"] = amx_bf16;
#endif
  return d;
}

}  // namespace

PYBIND11_MODULE(LIMBER_MODULE, m) {
  m.doc() = "limber_fast CPU kernels";
  m.attr("isa") = simd::name;
  m.def("cpu_features", &cpu_features, "Instruction sets that this processor and its operating system support.");
  m.def(
      "cpu_peaks",
      [](int threads) {
        py::gil_scoped_release g;
        Peaks k = cpu_peaks(threads);
        py::gil_scoped_acquire h;
        return py::make_tuple(k.fp32, k.bf16);
      },
      py::arg("threads"),
      "Multiply-add FLOP/s of one thread with `threads` busy: (fp32, bf16); bf16 is 0 without native products.");
  m.def(
      "read_bandwidth",
      [](int threads, int64_t bytes) {
        py::gil_scoped_release g;
        return read_bandwidth(threads, bytes);
      },
      py::arg("threads"), py::arg("bytes") = int64_t(1) << 29, "Bytes/s read from memory by `threads` threads.");

  py::class_<Scratch>(m, "Scratch", "Writable bytes on huge pages, reused by the next block of the same size.",
                      py::module_local(), py::buffer_protocol())
      .def(py::init<int64_t>(), py::arg("bytes"))
      .def_buffer([](Scratch& s) { return py::buffer_info(s.get(), 1, "B", s.bytes()); });

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
