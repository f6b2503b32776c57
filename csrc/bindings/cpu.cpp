// The CPU module: what the machine has and can do, and the kernels of each op (cpu_<stem>.h). Built once per
// instruction set; see setup.py.
#if defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "../cpu/ceilings.h"
#include "cpu_frozen_cross_entropy.h"
#include "cpu_info_nce.h"
#include "cpu_int8_linear.h"
#include "cpu_prefix_attention.h"
#include "cpu_project_concat.h"

using namespace limber;

namespace {

py::dict cpu_features() {
  py::dict d;
#if defined(__x86_64__) || defined(__i386__)
  __builtin_cpu_init();
#define LIMBER_FEATURE(name) d[#name] = bool(__builtin_cpu_supports(#name))
  LIMBER_FEATURE(avx2), LIMBER_FEATURE(fma), LIMBER_FEATURE(f16c), LIMBER_FEATURE(avx512f), LIMBER_FEATURE(avx512bw),
      LIMBER_FEATURE(avx512vl), LIMBER_FEATURE(avx512dq);
  LIMBER_FEATURE(avx512vnni), LIMBER_FEATURE(avx512bf16);
#undef LIMBER_FEATURE
  bool amx_tile = false, amx_bf16 = false, amx_int8 = false;
#if defined(__linux__)
  unsigned a, b, c, bits;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &bits)) {
    // Linux hands out tile registers on request, once per process; a kernel without AMX refuses.
    constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
    amx_tile = (bits >> 24 & 1) && syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
    amx_bf16 = amx_tile && (bits >> 22 & 1), amx_int8 = amx_tile && (bits >> 25 & 1);
  }
#endif
  d["amx_tile"] = amx_tile, d["amx_bf16"] = amx_bf16, d["amx_int8"] = amx_int8;
#endif
  return d;
}

}  // namespace

PYBIND11_MODULE(LIMBER_MODULE, m) {
  m.doc() = "limber_fast CPU kernels";
  m.attr("isa") = simd::name;
#if defined(LIMBER_BF16_PAIRS)
  m.attr("bf16_products") = pairs_pay();  // else bf16 operands are widened to fp32
#else
  m.attr("bf16_products") = false;
#endif
  m.def("cpu_features", &cpu_features, "Instruction sets that this processor and its operating system support.");
  m.def(
      "cpu_peaks",
      [](int threads) {
        py::gil_scoped_release g;
        Peaks k = cpu_peaks(threads);
        py::gil_scoped_acquire h;
        return py::make_tuple(k.fp32, k.bf16, k.int8);
      },
      py::arg("threads"),
      "Multiply-add FLOP/s of one thread with `threads` busy: (fp32, bf16, int8); 0 without native products.");
  m.def(
      "read_bandwidth",
      [](int threads, int64_t bytes) {
        py::gil_scoped_release g;
        return read_bandwidth(threads, bytes);
      },
      py::arg("threads"), py::arg("bytes") = int64_t(1) << 29, "Bytes/s read from memory by `threads` threads.");

  m.def(
      "advise_huge_pages", [](uintptr_t p, int64_t bytes) { advise_huge_pages(pointer<void>(p), bytes); },
      "Asks the system to back memory that nobody has written yet by huge pages.");

  py::class_<Scratch>(m, "Scratch", "Writable bytes on huge pages, reused by the next block of the same size.",
                      py::module_local(), py::buffer_protocol())
      .def(py::init<int64_t>(), py::arg("bytes"))
      .def_buffer([](Scratch& s) { return py::buffer_info(s.get(), 1, "B", s.bytes()); });

  bind_frozen_cross_entropy(m);
  bind_info_nce(m);
  bind_int8_linear(m);
  bind_prefix_attention(m);
  bind_project_concat(m);
}
