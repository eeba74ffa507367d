// Causal attention of one key/value head in bfloat16, and the table of its implementations.
#pragma once

#include <cstdint>

#include "rows.h"

namespace llmtrain {

// One key/value head with its `group` query heads. Positions are rows of d values; `row` is the
// distance of two positions in elements, `head` that of two query heads. first[i]: the first key
// that query i sees (it sees first[i]..i), or null for 0.
struct AttentionShape {
  int64_t s, d, group;
  float scale;
  const int32_t* first;
};

struct Matrix {
  bf16* data;
  int64_t row, head;
};

struct AttentionKernels {
  // Elements of float32 scratch that forward and backward need.
  int64_t (*forward_scratch)(int64_t s, int64_t d);
  int64_t (*backward_scratch)(int64_t s, int64_t d);
  // out = softmax(scale q k^T) v and lse [group, s], its log-sum-exp.
  void (*forward)(const AttentionShape& shape, Matrix q, Matrix k, Matrix v, Matrix out,
                  float* lse, float* scratch);
  void (*backward)(const AttentionShape& shape, Matrix q, Matrix k, Matrix v, Matrix out,
                   const float* lse, Matrix dout, Matrix dq, Matrix dk, Matrix dv,
                   float* scratch);
};

}  // namespace llmtrain
