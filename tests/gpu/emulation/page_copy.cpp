// The production source and its entry point, for ctypes.
#include "cuda/emulation.h"

#include "cuda/page_copy.cu"

EMULATED(limber::page_copy_cuda, limber::PageCopyParams)
