// limber_fast._cuda: raw pointers, sizes and the caller's stream. No torch header, no torch symbol; imports with no
// driver.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <unordered_set>
#include <vector>

#include "params/ceilings.h"
#include "params/page_copy.h"
#include "params/prefix_attention.h"

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

template <class T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void prefix_attention_fwd(std::uintptr_t q, std::uintptr_t k, std::uintptr_t v, std::int64_t q_stride,
                          std::int64_t k_stride, std::int64_t v_stride, std::uintptr_t pages, std::int64_t page_stride,
                          std::uintptr_t page_scales, std::int64_t page_scales_stride, std::int64_t T, std::int64_t N,
                          std::int64_t H, std::int64_t D, std::int64_t page_size, const std::string& dtype,
                          std::uintptr_t queries, std::uintptr_t lengths, std::uintptr_t page_table,
                          std::int64_t table_width, std::uintptr_t order, std::uintptr_t shared, std::int64_t runs,
                          std::uintptr_t alone, std::int64_t depth, std::uintptr_t positions, std::uintptr_t rotary,
                          std::int64_t rotary_dims, float scale, std::uintptr_t out, std::uintptr_t part_sums,
                          std::uintptr_t part_heads, std::int64_t slots, int device, std::uintptr_t stream) {
  if ((q | k | v | pages | out) % 16 || (q_stride | k_stride | v_stride) % 8 || page_stride % (page_scales ? 16 : 8) ||
      page_scales % 4)
    throw py::value_error("prefix_attention: rows and pages must be 16-byte aligned");
  if (page_size < 1 || page_size & (page_size - 1))
    throw py::value_error("prefix_attention: page_size must be a power of two");
  if (slots < limber::prefix_attention_slots(table_width, page_size, depth))
    throw py::value_error("prefix_attention: slots are too few; see prefix_attention_slots");
  limber::PrefixAttentionLaunch p{};
  p.q = pointer<void>(q), p.k = pointer<void>(k), p.v = pointer<void>(v);
  p.q_stride = q_stride, p.k_stride = k_stride, p.v_stride = v_stride;
  p.pages = pointer<void>(pages), p.page_stride = page_stride;
  p.T = T, p.N = N, p.H = H, p.D = D, p.page_size = page_size;
  p.page_scales = pointer<float>(page_scales), p.page_scales_stride = page_scales_stride;
  p.dtype = dtype == "bfloat16" ? limber::Dtype::bf16 : limber::Dtype::f16;
  p.page_dtype = page_scales ? limber::Dtype::i8 : p.dtype;
  p.queries = pointer<std::int32_t>(queries), p.lengths = pointer<std::int32_t>(lengths);
  p.page_table = pointer<std::int32_t>(page_table), p.table_width = table_width;
  p.order = pointer<std::int32_t>(order), p.shared = pointer<std::int32_t>(shared), p.runs = runs;
  p.alone = pointer<std::int32_t>(alone), p.positions = pointer<std::int32_t>(positions);
  p.rotary = pointer<float>(rotary), p.rotary_dims = rotary_dims, p.scale = scale, p.out = pointer<void>(out);
  p.part_sums = pointer<void>(part_sums), p.part_heads = pointer<float>(part_heads), p.slots = slots;
  p.device = device, p.stream = pointer<void>(stream);
  while ((std::int64_t(1) << p.page_shift) < page_size) ++p.page_shift;
  const py::gil_scoped_release unlocked;
  limber::prefix_attention_cuda(p);
}

void page_copy(std::uintptr_t pages, std::uintptr_t scales, std::int64_t layers, std::int64_t n_pages,
               std::int64_t page_bytes, std::int64_t scale_bytes, const std::vector<std::array<std::int32_t, 2>>& pairs,
               int device, std::uintptr_t stream) {
  if ((pages | scales) % 16 || (page_bytes | scale_bytes) % 16)
    throw py::value_error("page_copy: pages and their scales must be 16-byte aligned and multiples of 16 bytes");
  if (page_bytes < 0 || scale_bytes < 0 || (scale_bytes && !scales))
    throw py::value_error("page_copy: scales of scale_bytes must be given");
  std::unordered_set<std::int32_t> written;
  for (const auto& [from, to] : pairs) {
    if (from < 0 || from >= n_pages || to < 0 || to >= n_pages)
      throw py::value_error("page_copy: pages must lie in 0 .. n_pages - 1");
    if (!written.insert(to).second) throw py::value_error("page_copy: a page must be written once");
  }
  for (const auto& pair : pairs)
    if (written.count(pair[0])) throw py::value_error("page_copy: a page must not be both read and written");
  const py::gil_scoped_release unlocked;
  limber::page_copy_cuda({pointer<void>(pages), pointer<void>(scales), layers, n_pages, page_bytes, scale_bytes,
                          pairs.empty() ? nullptr : pairs[0].data(), std::int64_t(pairs.size()), device,
                          pointer<void>(stream)});
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
  m.def("page_copy", &page_copy, py::kw_only(), py::arg("pages"), py::arg("scales"), py::arg("layers"),
        py::arg("n_pages"), py::arg("page_bytes"), py::arg("scale_bytes"), py::arg("pairs"), py::arg("device"),
        py::arg("stream"), "See csrc/params/page_copy.h. Pointers are integers, 0 for none.");
  m.def("prefix_attention_slots", &limber::prefix_attention_slots, py::arg("table_width"), py::arg("page_size"),
        py::arg("depth"), "Parts that a row can have");
  m.def("prefix_attention_fwd", &prefix_attention_fwd, py::kw_only(), py::arg("q"), py::arg("k"), py::arg("v"),
        py::arg("q_stride"), py::arg("k_stride"), py::arg("v_stride"), py::arg("pages"), py::arg("page_stride"),
        py::arg("page_scales"), py::arg("page_scales_stride"), py::arg("T"), py::arg("N"), py::arg("H"), py::arg("D"),
        py::arg("page_size"), py::arg("dtype"), py::arg("queries"), py::arg("lengths"), py::arg("page_table"),
        py::arg("table_width"), py::arg("order"), py::arg("shared"), py::arg("runs"), py::arg("alone"),
        py::arg("depth"), py::arg("positions"), py::arg("rotary"), py::arg("rotary_dims"), py::arg("scale"),
        py::arg("out"), py::arg("part_sums"), py::arg("part_heads"), py::arg("slots"), py::arg("device"),
        py::arg("stream"), "See csrc/params/prefix_attention.h. Pointers are integers, 0 for none.");
}
