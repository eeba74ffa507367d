// Products of float32 matrices for AVX2, in the manner of Goto and van de Geijn (2008): panels of
// 16 columns of b in the first cache, a block of rows of a in the second, 6 x 16 sums in registers.
// Included once per instruction set, inside its namespace (KERNEL_SET).
#include <immintrin.h>

#include <algorithm>

#include "gemm.h"
#include "transpose8.h"

namespace KERNEL_SET {

using llmtrain::Gemm;
using llmtrain::Strided;

namespace {

constexpr int64_t kRows = 6, kColumns = 16;
constexpr int64_t kDepth = 512;   // of the sum, at a time
constexpr int64_t kWidth = 1536;  // columns of out, at a time
constexpr int64_t kBlockRows = 96;
constexpr int64_t kPad = 8;  // stores of 8 reach over the end of the last packed rows of a

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Equal steps of at most `most`, multiples of 8.
int64_t step_of(int64_t n, int64_t most) {
  const int64_t even = ceil_div(n, std::max<int64_t>(1, ceil_div(n, most)));
  return std::max<int64_t>(1, ceil_div(even, 8)) * 8;
}

struct Part {
  int64_t first_column, columns, first_step, steps;
};

Part part_of(const Gemm& job, int64_t part) {
  const int64_t depth = step_of(job.k, kDepth), deep = std::max<int64_t>(1, ceil_div(job.k, depth));
  const int64_t column = part / deep * kWidth, step = part % deep * depth;
  return {column, std::min(kWidth, job.n - column), step, std::min(depth, job.k - step)};
}

// out[s][i], `spread` apart: element s of row i of x, for `width` rows of which those from `rows`
// on are zero. Stores 8 floats a step where it can: up to 8 - width past the last one.
inline void interleave(Strided x, int64_t rows, int64_t steps, float* out, int64_t width,
                       int64_t spread) {
  int64_t s = 0;
  if (x.step == 1) {
    for (; s + 8 <= steps; s += 8) {
      __m256 r[8];
      for (int64_t i = 0; i < 8; ++i)
        r[i] = i < rows ? _mm256_loadu_ps(x.data + i * x.row + s) : _mm256_setzero_ps();
      transpose8(r);
      for (int64_t i = 0; i < 8; ++i) _mm256_storeu_ps(out + (s + i) * spread, r[i]);
    }
  } else if (x.row == 1) {
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i mask =
        _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(rows)), lanes);
    for (; s < steps; ++s)
      _mm256_storeu_ps(out + s * spread, _mm256_maskload_ps(x.data + s * x.step, mask));
  }
  for (; s < steps; ++s)
    for (int64_t i = 0; i < width; ++i)
      out[s * spread + i] = i < rows ? x.data[i * x.row + s * x.step] : 0.0f;
}

// c [6, 16] (+)= alpha a b of packed a [steps, 6] and b [steps, 16].
inline void tile(const float* a, const float* b, int64_t steps, float* c, int64_t c_row,
                 __m256 alpha, bool add) {
  __m256 low[kRows], high[kRows];
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) low[r] = high[r] = _mm256_setzero_ps();
  for (int64_t s = 0; s < steps; ++s, a += kRows, b += kColumns) {
    const __m256 left = _mm256_loadu_ps(b), right = _mm256_loadu_ps(b + 8);
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      const __m256 value = _mm256_broadcast_ss(a + r);
      low[r] = _mm256_fmadd_ps(value, left, low[r]);
      high[r] = _mm256_fmadd_ps(value, right, high[r]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
    float* at = c + r * c_row;
    const __m256 one = _mm256_mul_ps(low[r], alpha), two = _mm256_mul_ps(high[r], alpha);
    _mm256_storeu_ps(at, add ? _mm256_add_ps(_mm256_loadu_ps(at), one) : one);
    _mm256_storeu_ps(at + 8, add ? _mm256_add_ps(_mm256_loadu_ps(at + 8), two) : two);
  }
}

int64_t parts(const Gemm& job) {
  const int64_t deep = std::max<int64_t>(1, ceil_div(job.k, step_of(job.k, kDepth)));
  return ceil_div(job.n, kWidth) * deep;
}

int64_t packed_size(const Gemm& job) {
  const int64_t columns = ceil_div(std::min(job.n, kWidth), kColumns) * kColumns;
  // Not of the step, which is 264 for k = 513 and 512 for k = 512.
  return columns * std::min(kDepth, job.k);
}

int64_t panels(const Gemm& job, int64_t part) {
  return ceil_div(part_of(job, part).columns, kColumns);
}

void pack(const Gemm& job, int64_t part, float* packed, int64_t begin, int64_t end) {
  const Part own = part_of(job, part);
  for (int64_t p = begin; p < end; ++p) {
    float* out = packed + p * kColumns * own.steps;
    for (int64_t half = 0; half < kColumns; half += 8) {
      const int64_t column = p * kColumns + half;
      const int64_t rows = std::clamp<int64_t>(own.columns - column, 0, 8);
      const Strided x{job.b.data + (own.first_column + column) * job.b.row +
                          own.first_step * job.b.step,
                      job.b.row, job.b.step};
      interleave(x, rows, own.steps, out + half, 8, kColumns);
    }
  }
}

int64_t block_rows(const Gemm& job, int64_t threads) {
  const int64_t share = ceil_div(ceil_div(job.m, std::max<int64_t>(1, threads)), kRows) * kRows;
  return std::clamp(share, kRows, kBlockRows);
}

int64_t scratch() { return kBlockRows * kDepth + kPad + kRows * kColumns; }

// Rows [begin, end) of out, at most kBlockRows.
void block(const Gemm& job, int64_t part, const float* packed, int64_t begin, int64_t end,
           float* memory) {
  const Part own = part_of(job, part);
  float* edge = memory + kBlockRows * kDepth + kPad;
  for (int64_t i = begin; i < end; i += kRows) {
    const Strided x{job.a.data + i * job.a.row + own.first_step * job.a.step, job.a.row,
                    job.a.step};
    interleave(x, std::min(kRows, end - i), own.steps, memory + (i - begin) * own.steps, kRows,
               kRows);
  }
  const __m256 alpha = _mm256_set1_ps(job.alpha);
  const bool add = job.add || own.first_step > 0;
  for (int64_t j = 0; j < own.columns; j += kColumns) {
    const float* b = packed + j * own.steps;
    const int64_t columns = std::min(kColumns, own.columns - j);
    for (int64_t i = begin; i < end; i += kRows) {
      const float* a = memory + (i - begin) * own.steps;
      float* out = job.out + i * job.out_row + own.first_column + j;
      const int64_t rows = std::min(kRows, end - i);
      if (rows == kRows && columns == kColumns) {
        tile(a, b, own.steps, out, job.out_row, alpha, add);
        continue;
      }
      tile(a, b, own.steps, edge, kColumns, alpha, false);
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < columns; ++c) {
          const float value = edge[r * kColumns + c];
          out[r * job.out_row + c] = add ? out[r * job.out_row + c] + value : value;
        }
    }
  }
}

}  // namespace

extern const llmtrain::GemmKernels gemm;
const llmtrain::GemmKernels gemm{parts, packed_size, panels, pack, block_rows, scratch, block};

}  // namespace KERNEL_SET
