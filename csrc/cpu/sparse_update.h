// What follows the values of a sparse matrix: its transposed copy, its dense copy, and the
// optimizers that update all of it in one pass. Included once per instruction set, inside its
// namespace (KERNEL_SET).
#pragma once

#include "sparse.h"

namespace KERNEL_SET {

using llmtrain::SparseCopies;
using llmtrain::SparseSide;
using llmtrain::SparseUpdate;

// Calls fn(values of the tile, its place among the transposed, row, column) for a run's tiles.
template <class F>
void each_tile(const SparseCopies& job, int64_t run, const F& fn) {
  const SparseSide& side = job.side;
  const int64_t row = run % side.bands() * side.height, size = side.height * side.width;
  const int64_t column = run / side.bands() * side.chunk;
  for (int32_t tile = side.starts[run]; tile < side.starts[run + 1]; ++tile)
    fn(job.values + tile * size, job.turned + job.place[tile] * size, row,
       column + side.columns_of[tile]);
}

// The transposed copy of a tile, and the dense master weight where there is one.
inline void spread(const SparseSide& side, const float* tile, float* turned, float* weight,
                   int64_t row, int64_t column) {
  for (int64_t j = 0; j < side.width; ++j)
    for (int64_t h = 0; h < side.height; ++h)
      turned[h * side.width + j] = tile[j * side.height + h];
  if (weight == nullptr) return;
  for (int64_t h = 0; h < side.height && row + h < side.rows; ++h)
    for (int64_t j = 0; j < side.width && column + j < side.columns; ++j)
      weight[(row + h) * side.columns + column + j] = tile[j * side.height + h];
}

void repack(const SparseCopies& job, const float* weight, int64_t begin, int64_t end) {
  const SparseSide& side = job.side;
  for (int64_t run = begin; run < end; ++run)
    each_tile(job, run, [&](float* tile, float* turned, int64_t row, int64_t column) {
      for (int64_t j = 0; j < side.width; ++j)
        for (int64_t h = 0; h < side.height; ++h) {
          const bool inside = row + h < side.rows && column + j < side.columns;
          // Adding 0 turns -0 into 0.
          tile[j * side.height + h] =
              inside ? weight[(row + h) * side.columns + column + j] + 0.0f : 0.0f;
        }
      spread(side, tile, turned, nullptr, row, column);
    });
}

// Updates the values of the runs [begin, end), which lie side by side, then spreads each run.
template <class F>
void update(const SparseUpdate& job, int64_t begin, int64_t end, const F& fn) {
  const SparseSide& side = job.copies.side;
  const int64_t size = side.height * side.width;
  for (int64_t run = begin; run < end; ++run) {
    fn(side.starts[run] * size, side.starts[run + 1] * size);
    each_tile(job.copies, run, [&](float* tile, float* turned, int64_t row, int64_t column) {
      spread(side, tile, turned, job.weight, row, column);
    });
  }
}

void adamw(const SparseUpdate& job, int64_t begin, int64_t end) {
  float *p = job.copies.values, *m = job.first, *v = job.second;
  const float* g = job.grad;
  update(job, begin, end, [&](int64_t first, int64_t last) {
#pragma omp simd
    for (int64_t i = first; i < last; ++i) {
      m[i] += (1.0f - job.beta1) * (g[i] - m[i]);
      v[i] = job.beta2 * v[i] + (1.0f - job.beta2) * g[i] * g[i];
      const float denominator = __builtin_sqrtf(v[i]) * job.root + job.eps;
      p[i] = p[i] * job.decay - job.rate * m[i] / denominator + 0.0f;
    }
  });
}

void lion(const SparseUpdate& job, int64_t begin, int64_t end) {
  float *p = job.copies.values, *m = job.first;
  const float* g = job.grad;
  update(job, begin, end, [&](int64_t first, int64_t last) {
#pragma omp simd
    for (int64_t i = first; i < last; ++i) {
      const float c = m[i] + (1.0f - job.beta1) * (g[i] - m[i]);
      const float sign = c > 0.0f ? 1.0f : c < 0.0f ? -1.0f : c;  // NaN stays NaN
      p[i] = p[i] * job.decay - job.rate * sign + 0.0f;
      m[i] += (1.0f - job.beta2) * (g[i] - m[i]);
    }
  });
}

}  // namespace KERNEL_SET
