// Matrix products in bfloat16 with float32 sums, and the table of their implementations.
#pragma once

#include <cstdint>

#include "rows.h"

namespace llmtrain {

// The weight gradient of a linear layer, out (+)= grad^T x, in blocks that run in parallel.
// grad [n, rows], x [n, columns], out [rows, columns] float32, all contiguous.
struct WeightGradient {
  const bf16 *grad, *x;
  float* out;
  int64_t n, rows, columns;
  int64_t block_rows;  // rows of a block
  bool add;
};

struct ProductKernels {
  // Words that hold x packed, and the number of steps of 32 tokens in which to pack it.
  int64_t (*packed_words)(int64_t n, int64_t columns);
  void (*pack)(const bf16* x, int64_t n, int64_t columns, uint32_t* packed, int64_t begin,
               int64_t end);
  // Rows of a block that give every thread one; they do not change the result.
  int64_t (*block_rows)(int64_t rows, int64_t threads);
  // Blocks of the output, and the float32 scratch that computing one takes.
  int64_t (*blocks)(const WeightGradient& job);
  int64_t (*scratch)();
  void (*block)(const WeightGradient& job, const uint32_t* packed, int64_t index, float* scratch);
};

}  // namespace llmtrain
