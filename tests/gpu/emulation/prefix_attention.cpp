// The production source and its entry point, for ctypes.
#include "cuda/prefix_attention.cu"

extern "C" void emulated_prefix_attention(const limber::PrefixAttentionLaunch* params, int seed, int eager,
                                          emulation::Elsewhere elsewhere) {
  emulation::options = {seed, eager != 0, elsewhere};
  limber::prefix_attention_cuda(*params);
}
extern "C" int64_t size_of_params() { return sizeof(limber::PrefixAttentionLaunch); }
