// 2:4 weights for torch's semi-structured products. A thread takes 16 numbers of a row of the
// sparse matrix: one word of metadata, eight values. Of a transposed matrix neighbouring threads take
// neighbouring rows, which lie side by side in memory.
#include "semi.h"

#include "device.h"

namespace llmtrain {

constexpr int kThreads = 256, kWord = 16;

// The sparse matrix in terms of the mask's memory.
struct Sparse {
  int64_t height, length, down, across;
  __device__ explicit Sparse(const SemiMask& mask)
      : height(mask.turned ? mask.cols : mask.rows),
        length(mask.turned ? mask.rows : mask.cols),
        down(mask.turned ? 1 : mask.cols),
        across(mask.turned ? mask.cols : 1) {}
};

// Which two of four numbers are stored, two bits each, the first lowest. Fewer than two kept
// ones are filled up and more are cut off as torch's conversion does it.
__device__ inline uint32_t pair_of(const bool* kept) {
  const bool a = kept[0], b = kept[1], d = kept[3];
  const uint32_t first = a ? 0 : b ? 1 : 2;
  const uint32_t low = a == b || d ? 1 : 0, high = !a || !b ? 2 : 0;
  return first | (low | high) << 2;
}

// Place of word (row, column) of a matrix of `height` rows: eight rows of each of four groups of
// eight take turns, 2 x 2 words are transposed, and two columns are interleaved.
__device__ inline int64_t meta_place(int64_t row, int64_t column, int64_t height) {
  int64_t to = row / 32 * 32 + row % 8 * 4 + row % 32 / 8;
  const int64_t shift = column % 2 - to % 2;  // of the transposition: 1, 0 or -1
  to += shift;
  column -= shift;
  return column / 2 * height * 2 + to * 2 + column % 2;
}

// Row, word and mask of this thread's item: along the memory of the mask. False past the last one.
__device__ inline bool find_word(const SemiMask& mask, const Sparse& sparse, int64_t& row,
                                 int64_t& word, bool* kept) {
  const int64_t words = sparse.length / kWord;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= sparse.height * words) return false;
  row = mask.turned ? i % sparse.height : i / words;
  word = mask.turned ? i / sparse.height : i % words;
  const bool* from = mask.kept + row * sparse.down + word * kWord * sparse.across;
#pragma unroll
  for (int j = 0; j < kWord; ++j) kept[j] = from[j * sparse.across];
  return true;
}

__global__ void __launch_bounds__(kThreads) semi_meta_kernel(SemiMask mask, int16_t* meta) {
  const Sparse sparse(mask);
  int64_t row, word;
  bool kept[kWord];
  if (!find_word(mask, sparse, row, word, kept)) return;
  uint32_t bits = 0;
#pragma unroll
  for (int j = 0; j < kWord; j += 4) bits |= pair_of(kept + j) << j;
  meta[meta_place(row, word, sparse.height)] = static_cast<int16_t>(bits);
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    semi_repack_kernel(SemiMask mask, const T* __restrict__ weight, __nv_bfloat16* values) {
  const Sparse sparse(mask);
  int64_t row, word;
  bool kept[kWord];
  if (!find_word(mask, sparse, row, word, kept)) return;
  const T* from = weight + row * sparse.down + word * kWord * sparse.across;
  float number[kWord];
#pragma unroll
  for (int j = 0; j < kWord; ++j)  // x + 0 is +0.0 for either zero
    number[j] = kept[j] ? static_cast<float>(from[j * sparse.across]) + 0.0f : 0.0f;
  __align__(16) __nv_bfloat16 out[kWord / 2];
#pragma unroll
  for (int j = 0; j < kWord; j += 4) {
    const uint32_t pair = pair_of(kept + j), one = pair & 3, two = pair >> 2;
    // Chosen by comparisons: an index would send the numbers to memory.
    const float* n = number + j;
    out[j / 2] = __float2bfloat16_rn(one == 0 ? n[0] : one == 1 ? n[1] : n[2]);
    out[j / 2 + 1] = __float2bfloat16_rn(two == 1 ? n[1] : two == 2 ? n[2] : n[3]);
  }
  write<kWord / 2>(values + (row * sparse.length + word * kWord) / 2, out);
}

unsigned blocks_of(const SemiMask& mask) {
  return static_cast<unsigned>((mask.rows * mask.cols / kWord + kThreads - 1) / kThreads);
}

cudaError_t semi_meta(const SemiMask& mask, int16_t* meta, cudaStream_t stream) {
  if (mask.rows * mask.cols == 0) return cudaSuccess;
  semi_meta_kernel<<<blocks_of(mask), kThreads, 0, stream>>>(mask, meta);
  return cudaGetLastError();
}

cudaError_t semi_repack(const SemiMask& mask, const void* weight, bool bfloat16,
                        __nv_bfloat16* values, cudaStream_t stream) {
  if (mask.rows * mask.cols == 0) return cudaSuccess;
  if (bfloat16)
    semi_repack_kernel<__nv_bfloat16><<<blocks_of(mask), kThreads, 0, stream>>>(
        mask, static_cast<const __nv_bfloat16*>(weight), values);
  else
    semi_repack_kernel<float><<<blocks_of(mask), kThreads, 0, stream>>>(
        mask, static_cast<const float*>(weight), values);
  return cudaGetLastError();
}

}  // namespace llmtrain
