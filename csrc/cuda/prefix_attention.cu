#include "cuda/prefix_attention.cuh"

#include <algorithm>

#include "cuda/runtime.cuh"

namespace limber {

namespace {

constexpr int BLOCKS_PER_SM = 2;

int64_t blocks_each(int64_t wanted, int64_t others, int64_t most) {
  return std::clamp<int64_t>(wanted / std::max<int64_t>(others, 1), 1, std::max<int64_t>(most, 1));
}

template <class Element, class Stored, int D, int ROWS>
void rest(const PrefixAttentionLaunch& p) {
  using Tile = AttentionTile<Element, Stored, D, ROWS>;
  launch(prefix_attention_rest_kernel<Tile>, "prefix_attention_rest_kernel",
         dim3(unsigned(p.T / ROWS + std::min(p.N, p.T)), unsigned(p.H)), THREADS, Tile::SHARED, p.stream, p);
}

template <class Element, class Stored, int D>
void both(PrefixAttentionLaunch& p) {
  using Tile = AttentionTile<Element, Stored, D, 32>;
  // Splits beyond what fills the chip follow each other in one block, which keeps its queries.
  const int64_t splits = prefix_attention_slots(p.table_width, p.page_size, 0);
  const int64_t wanted = BLOCKS_PER_SM * multiprocessors(p.device);
  p.run_tiles = int((p.T + Tile::ROWS - 1) / Tile::ROWS);
  p.run_blocks = int(blocks_each(wanted, p.H, splits));
  p.alone_blocks = int(blocks_each(wanted, p.H * p.N, splits));
  const int64_t tasks = p.runs * p.run_tiles * p.run_blocks + p.N * p.alone_blocks + p.T;
  launch(prefix_attention_parts_kernel<Tile>, "prefix_attention_parts_kernel", dim3(unsigned(tasks), unsigned(p.H)),
         THREADS, Tile::SHARED, p.stream, p);
  if (p.T < 4 * p.N) return rest<Element, Stored, D, 16>(p);
  rest<Element, Stored, D, 32>(p);
}

template <class Element, class Stored = Element>
void of_dtype(PrefixAttentionLaunch& p) {
  switch (p.D) {
    case 64:
      return both<Element, Stored, 64>(p);
    case 128:
      return both<Element, Stored, 128>(p);
    case 256:
      return both<Element, Stored, 256>(p);
  }
  throw std::invalid_argument("prefix_attention: heads have 64, 128 or 256 dimensions");
}

}  // namespace

void prefix_attention_cuda(PrefixAttentionLaunch p) {
  if (!p.T) return;
  const DeviceGuard guard(p.device);
  if (p.page_dtype == Dtype::i8)
    p.dtype == Dtype::bf16 ? of_dtype<__nv_bfloat16, int8_t>(p) : of_dtype<__half, int8_t>(p);
  else
    p.dtype == Dtype::bf16 ? of_dtype<__nv_bfloat16>(p) : of_dtype<__half>(p);
}

}  // namespace limber
