// The weight gradient of a linear layer in bfloat16 with float32 sums, for AMX.
//
// The sum runs over the tokens, along which neither operand lies in order: both are repacked into
// tiles. x is packed once; of grad each block of the output packs its own columns, a few hundred
// tokens at a time, so that what the inner loop reads stays in the caches.
#include "products.h"

#include "tiles.h"

namespace KERNEL_SET {

using llmtrain::WeightGradient;

constexpr int64_t kRows = 512;     // most rows of an output block
constexpr int64_t kGroup = 128;    // rows of grad^T packed at a time
constexpr int64_t kColumns = 512;  // most columns of an output block
constexpr int64_t kSteps = 16;     // steps of 32 tokens between two visits of an output block

int64_t steps32(int64_t n) { return (n + 31) / 32; }

int64_t packed_words(int64_t n, int64_t columns) {
  return steps32(n) * steps32(columns) * 2 * kTile;
}

// Where packed x starts for tokens from step `first` (a multiple of kSteps) and 32 columns from
// `column`: chunks of kSteps lie one after the other, so that one chunk is dense in the cache.
int64_t packed_at(int64_t steps, int64_t columns, int64_t first, int64_t column) {
  const int64_t count = steps - first < kSteps ? steps - first : kSteps;
  return (first * steps32(columns) + column / 32 * count) * 2 * kTile;
}

// Packed x: for kSteps of 32 tokens, for 32 columns, for each step, two right tiles. Packs the
// steps [begin, end).
void pack(const bf16* x, int64_t n, int64_t columns, uint32_t* packed, int64_t begin,
          int64_t end) {
  const int64_t steps = steps32(n);
  for (int64_t step = begin; step < end; ++step) {
    const int64_t first = step / kSteps * kSteps;
    for (int64_t c = 0; c < columns; c += 16) {
      uint32_t* tile = packed + packed_at(steps, columns, first, c) +
                       ((step - first) * 2 + c / 16 % 2) * kTile;
      for (int64_t p = 0; p < 16; ++p)
        _mm512_storeu_si512(tile + 16 * p, load_pair(x, n, columns, step * 32 + 2 * p, c));
    }
  }
}

// Left tiles of `count` steps from `first` of the kGroup columns of grad from `row`: for 32 rows
// of the output, for each step of 32 tokens, two tiles of 16 rows x 32 tokens. Rows of grad are
// read whole before they are transposed.
void pack_left(const WeightGradient& job, int64_t row, int64_t first, int64_t count,
               uint32_t* out) {
  constexpr int64_t tiles = kGroup / 16;
  __m512i words[tiles][16];
  for (int64_t step = 0; step < count; ++step) {
    // The next rows lie on other pages, which the processor does not fetch ahead by itself.
    for (int64_t token = (first + step + 1) * 32; token < (first + step + 2) * 32; ++token)
      for (int64_t t = 0; t < tiles; t += 2)
        _mm_prefetch(job.grad + token * job.rows + row + 16 * t, _MM_HINT_T0);
    for (int64_t p = 0; p < 16; ++p)
      for (int64_t t = 0; t < tiles; ++t)
        words[t][p] =
            load_pair(job.grad, job.n, job.rows, (first + step) * 32 + 2 * p, row + 16 * t);
    for (int64_t t = 0; t < tiles; ++t) {
      transpose16(words[t]);
      uint32_t* tile = out + ((t / 2 * count + step) * 2 + t % 2) * kTile;
      for (int64_t k = 0; k < 16; ++k) _mm512_storeu_si512(tile + 16 * k, words[t][k]);
    }
  }
}

int64_t blocks(const WeightGradient& job) {
  return (job.rows + job.block_rows - 1) / job.block_rows * ((job.columns + kColumns - 1) / kColumns);
}

int64_t block_rows(int64_t rows, int64_t threads) {
  const int64_t share = (rows + threads - 1) / threads;
  const int64_t rounded = (share + kGroup - 1) / kGroup * kGroup;
  return rounded < kRows ? rounded : kRows;
}

int64_t scratch() { return 64 + kGroup * kSteps * 16 + kRows * kColumns; }

void store_sums(const WeightGradient& job, const float* sums, int64_t width, int64_t row,
                int64_t rows, int64_t column, int64_t columns) {
  for (int64_t r = 0; r < rows; ++r) {
    float* out = job.out + (row + r) * job.columns + column;
    for (int64_t c = 0; c < columns; c += 16) {
      const __mmask16 mask = columns - c >= 16 ? 0xffff : (1u << (columns - c)) - 1;
      __m512 sum = _mm512_loadu_ps(sums + r * width + c);
      if (job.add) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(mask, out + c));
      _mm512_mask_storeu_ps(out + c, mask, sum);
    }
  }
}

void block(const WeightGradient& job, const uint32_t* packed, int64_t index, float* memory) {
  const TileScope tiles;
  const int64_t across = (job.columns + kColumns - 1) / kColumns;
  const int64_t row = index / across * job.block_rows, column = index % across * kColumns;
  const int64_t rows = job.rows - row < job.block_rows ? job.rows - row : job.block_rows;
  const int64_t columns = job.columns - column < kColumns ? job.columns - column : kColumns;
  const auto address = (reinterpret_cast<uintptr_t>(memory) + 63) / 64 * 64;
  auto* left = reinterpret_cast<uint32_t*>(address);
  auto* sums = reinterpret_cast<float*>(left) + kGroup * kSteps * 16;
  const int64_t steps = steps32(job.n), width = steps32(columns) * 32;
  for (int64_t first = 0; first < steps; first += kSteps) {
    const int64_t count = steps - first < kSteps ? steps - first : kSteps;
    for (int64_t group = 0; group < rows; group += kGroup) {
      pack_left(job, row + group, first, count, left);
      const int64_t end = rows - group < kGroup ? rows - group : kGroup;
      for (int64_t r = 0; r < end; r += 32)
        for (int64_t c = 0; c < columns; c += 32)
          product(reinterpret_cast<const bf16*>(left + r / 32 * count * 2 * kTile), 32,
                  packed + packed_at(steps, job.columns, first, column + c), kTile, 2 * kTile,
                  count, sums + (group + r) * width + c, width, first > 0, 1024);
    }
  }
  store_sums(job, sums, width, row, rows, column, columns);
}

extern const llmtrain::ProductKernels products;
const llmtrain::ProductKernels products = {packed_words, pack, block_rows, blocks, scratch, block};

}  // namespace KERNEL_SET
