// limber_fast._cuda: raw pointers, sizes and the caller's stream. No torch header, no torch symbol; imports with no
// driver.
#include <pybind11/pybind11.h>

#include <stdexcept>

#include "params/ceilings.h"

namespace py = pybind11;

namespace {

py::dict properties_dict(int device) {
  const auto p = limber::device_properties(device);
  py::dict out;
  out["name"] = p.name;
  out["capability"] = py::make_tuple(p.major, p.minor);
  out["multiprocessors"] = p.multiprocessors;
  out["memory_bytes"] = p.memory_bytes;
  out["l2_bytes"] = p.l2_bytes;
  out["shared_memory_bytes"] = p.shared_memory_bytes;
  out["clock_khz"] = p.clock_khz;
  out["memory_clock_khz"] = p.memory_clock_khz;
  out["memory_bus_bits"] = p.memory_bus_bits;
  return out;
}

py::dict build_dict() {
  const auto versions = limber::cuda_versions();
  py::dict out;
  out["compiler"] = versions.compiler;
  out["runtime"] = versions.runtime;
  out["driver"] = versions.driver;
  out["targets"] = LIMBER_CUDA_TARGETS;
  return out;
}

void read_words(std::uintptr_t source, std::int64_t bytes, std::uintptr_t partials, int blocks, int device,
                std::uintptr_t stream) {
  if (source % 16 != 0) throw py::value_error("read_words: source must be 16-byte aligned");
  if (bytes < 0 || bytes % 16 != 0) throw py::value_error("read_words: bytes must be a multiple of 16");
  if (blocks < 1) throw py::value_error("read_words: blocks must be at least 1");
  const py::gil_scoped_release unlocked;
  limber::read_words({reinterpret_cast<const void*>(source), bytes, reinterpret_cast<std::uint32_t*>(partials), blocks,
                      device, reinterpret_cast<void*>(stream)});
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of limber_fast";
  m.def("build", &build_dict, "CUDA versions as 1000 * major + 10 * minor (driver 0 where there is none) and targets");
  m.def("device_count", &limber::device_count, "RuntimeError with the runtime's words where there is no driver");
  m.def("device_properties", &properties_dict, py::arg("device"));
  m.def("read_words", &read_words, py::arg("source"), py::arg("bytes"), py::arg("partials"), py::arg("blocks"),
        py::arg("device"), py::arg("stream"),
        "Reads source once; partials [blocks] uint32 receives the sum of its 32-bit words, modulo 2^32, in parts");
}
