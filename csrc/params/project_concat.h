// Arguments of the fused projection of soft prompts: pointers, sizes, strides in elements. No torch, no ownership.
//
// rows = n_images k soft prompts; soft prompt r is feature row r % k of image r / k. Features, weight, embedding and
// the incoming gradient are contiguous in their last dimension; everything written is contiguous.
#pragma once
#include "dtype.h"

namespace limber {

struct ProjectConcatParams {
  const void* features;  // [n_images, k, D]
  const void* weight;    // [E, D]
  const void* bias;      // [E] or null
  int64_t n_images, k, D, E;
  int64_t image_stride, row_stride, weight_stride;
  Dtype dtype;               // of features, weight, bias, inputs_embeds and their gradients
  const int64_t* positions;  // [rows] place of soft prompt r among the tokens
  int threads;

  bool dropout;        // element e of soft prompt r is dropped where its random word lies below `threshold`
  uint32_t threshold;  // see csrc/cpu/dropout.h
  float factor;        // 1 / (1 - p)
  uint64_t seed;

  bool layer_norm;  // of the soft prompts, after dropout
  double ln_eps;
  const float *ln_weight, *ln_bias;  // [E] or null

  // Forward: tokens = B S rows of inputs_embeds.
  const int64_t* input_ids;  // [tokens]
  int64_t tokens, image_token_id;
  const void* embedding;  // [V, E]
  int64_t embedding_stride;
  Dtype embedding_dtype;
  const float* embedding_scales;  // [V], of an int8 embedding
  void* inputs_embeds;            // [tokens, E]

  // Backward: the gradient of inputs_embeds, and outputs that are null where not wanted.
  const void* grad;  // [B, S, E]
  int64_t S, grad_batch_stride, grad_token_stride;
  void *d_features, *d_weight, *d_bias;  // [n_images, k, D], [E, D], [E]
  float *d_ln_weight, *d_ln_bias;        // [E]
};

// Of the CPU: csrc/cpu/project_concat.cpp.
void project_concat_fwd(const ProjectConcatParams& p);
void project_concat_bwd(const ProjectConcatParams& p);

}  // namespace limber
