// The vector type that the build's instruction set gives: one source, one module per instruction set.
#pragma once
#if defined(LIMBER_ISA_AVX512) || defined(LIMBER_ISA_AMX)
#define LIMBER_BF16_PAIRS 1  // bf16 products without widening
#include "simd_avx512.h"
#elif defined(LIMBER_ISA_AVX2)
#include "simd_avx2.h"
#else
#include "simd_generic.h"
#endif
