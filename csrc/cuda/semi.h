// Launchers of what packs 2:4 weights for torch's semi-structured products: the layout of CUTLASS
// for sm_80 (torch/sparse/_semi_structured_conversions.py), for a mask that stays.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace llmtrain {

// A mask of single weights [rows, cols], at most two kept of every aligned four along the rows; or
// along the columns where `turned`: then the sparse matrix is the transposed one. The length of its
// rows is a multiple of 16, their number one of 32.
struct SemiMask {
  const bool* kept;
  int64_t rows, cols;
  bool turned;
};

// Where the two values of each four lie: one word for 16 numbers, [rows of the sparse matrix,
// length / 16], in CUTLASS's order.
cudaError_t semi_meta(const SemiMask& mask, int16_t* meta, cudaStream_t stream);

// values [rows of the sparse matrix, length / 2]: two of every four of `weight` [rows, cols],
// float32 or bfloat16, rounded; +0.0 in the place of what is not kept, and no -0.0.
cudaError_t semi_repack(const SemiMask& mask, const void* weight, bool bfloat16,
                        __nv_bfloat16* values, cudaStream_t stream);

}  // namespace llmtrain
