// Arguments of the int8 linear kernels: pointers, sizes, strides in elements. No torch, no ownership.
//
// The weight is [N, K] integers within -127..127, packed as [ceil(N / 32)][ceil(K / 64) 16][32][4]: element
// [b][g][c][j] is row 32 b + c, column 4 g + j, zero beyond N and K. Rows of x, residual and the incoming gradient are
// contiguous; everything written is contiguous.
#pragma once
#include "dtype.h"

namespace limber {

struct Int8LinearParams {
  int64_t M, N, K;  // rows of x, output channels, input channels
  Dtype dtype;      // of x, residual, what is written, and the gradients
  const int8_t* packed;
  const float* scales;  // [N]
  int threads;

  // Forward.
  const void* x;  // [M, K]
  int64_t x_stride;
  const int32_t* row_sums;  // [N] sums of the integers over K
  const float* bias;        // [N] or null
  const void* residual;     // [M, N] or null
  int64_t residual_stride;
  bool gelu;                // gelu_new before the residual
  bool eight_bits;          // of x, else 16
  float outlier_threshold;  // with eight bits: from here on elements of x are multiplied in fp32
  void* out;                // [M, N]
  void* preactivation;      // [M, N], also written by the forward, read by the backward; or null

  // Backward.
  const void* grad;  // [M, N]
  int64_t grad_stride;
  const int32_t* column_sums;  // [K] sums of the integers over N
  void* d_x;                   // [M, K]
};

// Of the CPU: csrc/cpu/int8_linear.cpp.
void int8_linear_fwd(const Int8LinearParams& p);
void int8_linear_bwd(const Int8LinearParams& p);

}  // namespace limber
