// Arguments of the frozen cross entropy kernel: pointers, sizes, strides in elements. No torch, no ownership.
#pragma once
#include "dtype.h"

namespace limber {

struct FrozenCrossEntropyParams {
  int64_t M, D, V;  // rows, features, vocabulary
  Dtype dtype;      // of hidden and its gradient
  int threads;
  const void* hidden;  // [M, D], contiguous in D
  int64_t hidden_stride;
  const int64_t* labels;  // [M], within 0 .. V-1 or ignore_index
  int64_t ignore_index;
  const int8_t* packed;  // the weight [V, D] as in int8_linear.h, N = V and K = D
  const float* scales;   // [V]
  const int32_t *row_sums, *column_sums;
  const float* bias;  // [V] or null
  float* losses;      // [M], 0 where ignored
  void* d_hidden;     // [M, D] d losses[m] / d hidden[m], 0 where ignored; or null

  // Backward: d_hidden[m] = d_losses[m] gradient[m].
  const void* gradient;  // [M, D] as the forward wrote it
  const float* d_losses;
};

// Of the CPU: csrc/cpu/frozen_cross_entropy.cpp.
void frozen_cross_entropy_fwd(const FrozenCrossEntropyParams& p);
void frozen_cross_entropy_bwd(const FrozenCrossEntropyParams& p);

}  // namespace limber
