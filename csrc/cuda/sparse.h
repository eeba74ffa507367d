// Launchers of the kernels of sparse training on CUDA.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace llmtrain {

// Which blocks of a matrix [rows, columns] are kept: one byte a block, [.., across].
struct BlockMask {
  const bool* kept;
  int64_t rows, columns, high, wide, across;
};

// +0.0 wherever the mask prunes, in place; elements of 4 or 2 bytes.
cudaError_t mask_apply(void* x, int element, const BlockMask& mask, cudaStream_t stream);

// The best of the 90 patterns that keep 2 of 4 in every row and column of a tile, for each 4 x 4
// tile of scores [rows, columns] float32. Of equal sums the first pattern, in the order of
// `patterns`: [90] with bit 4 r + c set where (r, c) is kept.
cudaError_t transposable(const float* scores, bool* kept, int64_t rows, int64_t columns,
                         const int32_t* patterns, int count, cudaStream_t stream);

// One step of AdamW on the kept weights; weight and moments become +0.0 elsewhere.
struct MaskedAdamW {
  float *weight, *first, *second;
  const float* grad;
  float decay, beta1, beta2, rate, eps, root;  // as in csrc/cpu/sparse.h
};
cudaError_t masked_adamw(const MaskedAdamW& job, const BlockMask& mask, cudaStream_t stream);

}  // namespace llmtrain
