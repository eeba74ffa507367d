// Products with a matrix of which only some tiles are kept, and the table of their
// implementations.
#pragma once

#include <cstdint>

#include "rows.h"

namespace llmtrain {

// A matrix [rows, columns] as the kernels read it (llmtrain/ops/sparse.py packs it).
//
// The rows are cut into bands of `height` (1, 2 or 4) and the columns into chunks, whose columns
// of a token panel fit into the first cache. Tiles of one chunk and band lie side by side; chunk c
// and band b hold the tiles starts[c * bands + b] up to the next start. A tile is `width` columns
// of `height` values. Tiles at the edges may stick out of the matrix; their values there are 0.
struct SparseSide {
  const int32_t* starts;
  const int32_t* columns_of;  // the first column of each tile, counted from its chunk's first
  const float* values;        // [tiles, width, height]; not read by the gradient
  int64_t rows, columns, height, width, chunk;

  int64_t bands() const { return (rows + height - 1) / height; }
  int64_t chunks() const { return (columns + chunk - 1) / chunk; }
};

// y = x W^T: x [tokens, columns], y [tokens, rows], contiguous. Token groups run in parallel.
template <class T>
struct SparseProduct {
  SparseSide side;
  const T* x;
  T* y;
  int64_t tokens;
  int64_t columns;  // of x: those of the side, which has half as many where it holds pairs
  int64_t panels;   // of a group
};

// The gradient of the values of W, of dy [tokens, rows] and x [tokens, columns].
template <class T>
struct SparseGradient {
  SparseSide side;
  const T *dy, *x;  // turned by `turn`: [token chunks, rows or columns rounded up, kTokens]
  float* out;           // [tiles, width, height]
  int64_t tokens;
};

// The master weight [rows, columns] and the two copies of its tiles that products read.
struct SparseCopies {
  SparseSide side;
  const int32_t* place;  // [tiles]: where tile i lies among the transposed ones
  float* values;         // [tiles, width, height]
  float* turned;         // [tiles, height, width]
};

// One step of an optimizer on packed values; the factors are what the step number makes of the
// hyper-parameters.
struct SparseUpdate {
  SparseCopies copies;
  const float* grad;
  float *first, *second;  // moments; second is null for Lion
  float *weight;          // the dense master weight that follows, or null
  float decay;            // 1 - lr * weight decay
  float beta1, beta2, rate, eps;
  float root;             // 1 / sqrt(1 - beta2^step)
};

// A matrix in pairs of columns, as bfloat16 products read it: a word holds the values of two
// columns, the left one in its low half. It is a side with half as many columns and a chunk and a
// width half as wide; tiles one column wide are paired, and the runs begin elsewhere.
struct SparseWords {
  const int32_t* starts;
  int32_t* columns_of;  // in pairs
  uint32_t* words;      // [tiles, pairs of the width, height]
};

// Tokens of a chunk of the gradient's sums; a multiple of three vectors of any set.
constexpr int64_t kTokens = 384;

template <class T>
struct SparseKernels {
  // Tokens of a panel, for bands of a height.
  int64_t (*panel)(int64_t height);
  int64_t (*scratch)(const SparseProduct<T>& job);  // floats
  void (*group)(const SparseProduct<T>& job, int64_t index, float* scratch);
  // x [tokens, columns] -> chunk `index` of [chunks, columns rounded up to `multiple`, kTokens].
  void (*turn)(const T* x, int64_t tokens, int64_t columns, int64_t multiple, float* out,
               int64_t index);
};

struct SparseSet {
  SparseKernels<float> f32;
  SparseKernels<bf16> b16;
  // Bands [begin, end) of chunk `chunk`; the rest of `out` is left alone.
  void (*gradient)(const SparseGradient<float>& job, int64_t chunk, int64_t begin, int64_t end);
  // Tiles of the runs [begin, end), a run being a chunk's band: fills both copies.
  void (*repack)(const SparseCopies& copies, const float* weight, int64_t begin, int64_t end);
  void (*adamw)(const SparseUpdate& job, int64_t begin, int64_t end);
  void (*lion)(const SparseUpdate& job, int64_t begin, int64_t end);
};

// Products of bfloat16 with float32 sums, of weights rounded to bfloat16.
struct SparsePairs {
  // For a width of 1: pairs of the runs [begin, end), into counts [runs].
  void (*count)(const SparseSide& side, int32_t* counts, int64_t begin, int64_t end);
  // The words of the runs [begin, end).
  void (*pack)(const SparseSide& side, const SparseWords& out, int64_t begin, int64_t end);
  // As in SparseKernels, on a side of words.
  int64_t (*panel)(int64_t height);
  int64_t (*scratch)(const SparseProduct<bf16>& job);
  void (*group)(const SparseProduct<bf16>& job, int64_t index, float* scratch);
  // As in SparseKernels and SparseSet, on a side of values.
  void (*turn)(const bf16* x, int64_t tokens, int64_t columns, int64_t multiple, bf16* out,
               int64_t index);
  void (*gradient)(const SparseGradient<bf16>& job, int64_t chunk, int64_t begin, int64_t end);
};

}  // namespace llmtrain
