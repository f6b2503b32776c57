// Arguments of the fused InfoNCE kernels: pointers, sizes, strides in elements. No torch, no ownership.
//
// N image rows, M text rows, K extra negatives (columns M .. M+K-1, image-to-text direction only), D features.
// Every row is contiguous in D; gradients are contiguous. State arrays are [field][row], fields as named below.
#pragma once
#include "dtype.h"

namespace limber {

// Fields of the per-row (and per-column) state that the forward leaves for the backward and for the caller.
enum InfoNceField {
  LSE_EXPONENT = 0,  // log-sum-exp = exponent + remainder, in log2 units, without the bias; the exponent is an integer,
  LSE_REMAINDER = 1,  // the remainder lies in [-1/2, 1/2]: one float would lose 7e-4 at scale 100
  DBIAS = 0,          // of the sigmoid variant, which has no log-sum-exp: d loss / d bias
  LOSS = 2,           // nats, full relative precision
  DSCALE = 3,         // d loss / d scale
  // With label smoothing alone; without it LOSS is the first of them.
  NLL = 4,      // -log P(positive), nats, full relative precision
  UNIFORM = 5,  // label_smoothing / number of candidates
};

struct InfoNceParams {
  const void *image, *text, *extra;  // [N, D], [M, D], [K, D]
  int64_t N, M, K, D;
  int64_t image_stride, text_stride, extra_stride;  // row strides
  Dtype dtype;
  double scale, bias, label_smoothing;
  bool normalize, sigmoid, columns;  // columns: the text-to-image direction counts too
  int threads;
  const int32_t* labels;                // [N] column of each row's positive; null: the diagonal
  const int32_t *image_ids, *text_ids;  // [N], [M]; equal ids are not negatives; null: no masking
  float *row_state, *col_state;         // [fields, N], [fields, M]; col_state only with columns
  uint8_t *row_correct, *col_correct;   // [N], [M] top-1, or null
  void* cache;                          // tiles kept for the backward, or null
  int64_t cache_bytes;
  const float *row_grad, *col_grad;  // backward: d loss / d row LOSS [N], d col LOSS [M] (null without columns)
  void *d_image, *d_text, *d_extra;  // backward outputs, null where not wanted
};

// Of the CPU: csrc/cpu/info_nce.cpp.
void info_nce_fwd(const InfoNceParams& p);
void info_nce_bwd(const InfoNceParams& p);

}  // namespace limber
