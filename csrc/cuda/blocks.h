// Launchers of the products with a weight [rows, cols] of which only some tiles of 64 x 64 are kept.
// bfloat16 with sums in float32; rows and cols are multiples of 8, and tiles may stick out.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace llmtrain {

constexpr int kTile = 64;

// y [n, width] = scale x [n, depth] B + bias. Band j of 64 columns of y has the tiles starts[j] to
// starts[j + 1]; tile t multiplies the columns 64 others[t] and on of x and lies at place[t] in
// `values` [tiles, 64, 64]. B is the weight transposed (depth = cols: x W^T), or the weight itself
// where `turned` (depth = rows: dy W).
struct BlockProduct {
  const __nv_bfloat16 *x, *values;
  const __nv_bfloat16* bias;  // [width] or null
  __nv_bfloat16* y;
  const int32_t *starts, *others, *place;
  int64_t n, depth, width;
  float scale;
};
cudaError_t block_product(const BlockProduct& job, bool turned, cudaStream_t stream);

// out [rows, cols] += scale dy^T x at the kept tiles; dy [n, rows], x [n, cols]. Tokens are cut into
// `parts`, summed one by one into `partial` [parts, tiles, 64, 64] and then together: few tiles would
// leave most of a GPU idle. With one part `partial` is not used.
struct BlockGradient {
  const __nv_bfloat16 *dy, *x;
  float *out, *partial;
  const int32_t *rows_of, *cols_of;  // [tiles], in tiles
  int64_t n, rows, cols, tiles, parts;
  float scale;
};

// A number of parts that fills large GPUs, the same on all of them, so that results are.
int64_t gradient_parts(int64_t n, int64_t tiles);

cudaError_t block_gradient(const BlockGradient& job, cudaStream_t stream);

// values [tiles, 64, 64]: the kept tiles of `weight` [rows, cols], float32 or bfloat16, rounded; no
// -0.0, and zeros where a tile sticks out.
struct BlockPack {
  const void* weight;
  __nv_bfloat16* values;
  const int32_t *rows_of, *cols_of;
  int64_t rows, cols, tiles;
  bool bfloat16;
};
cudaError_t block_pack(const BlockPack& job, cudaStream_t stream);

}  // namespace llmtrain
