// The production source and its entry point, for ctypes.
#include "cuda/emulation.h"

#include "cuda/prefix_attention.cu"

EMULATED(limber::prefix_attention_cuda, limber::PrefixAttentionLaunch)
