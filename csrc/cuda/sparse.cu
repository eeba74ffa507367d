// Mask application, the search for transposable 2:4 masks, and AdamW under a mask: each one pass
// over memory, bound by it.
#include "sparse.h"

namespace llmtrain {

constexpr int kThreads = 256, kPatterns = 96;

unsigned blocks_for(int64_t n) {
  const int64_t blocks = (n + kThreads - 1) / kThreads;
  return static_cast<unsigned>(blocks < (1 << 20) ? blocks : 1 << 20);
}

// In 32 bits, whose divisions take a fraction of the time: the launchers see to it that they do.
__device__ bool is_kept(const BlockMask& mask, int64_t i) {
  if (mask.high == 1 && mask.wide == 1) return mask.kept[i];
  const auto at = static_cast<uint32_t>(i), columns = static_cast<uint32_t>(mask.columns);
  const uint32_t row = at / columns, column = at % columns;
  const uint32_t down = row / static_cast<uint32_t>(mask.high);
  const uint32_t across = column / static_cast<uint32_t>(mask.wide);
  return mask.kept[static_cast<int64_t>(down) * mask.across + across];
}

bool fits(int64_t n) { return n <= UINT32_MAX; }

template <class T>
__global__ void __launch_bounds__(kThreads) mask_kernel(T* x, BlockMask mask, int64_t n) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < n; i += step)
    if (!is_kept(mask, i)) x[i] = T{0};
}

cudaError_t mask_apply(void* x, int element, const BlockMask& mask, cudaStream_t stream) {
  const int64_t n = mask.rows * mask.columns;
  if (n == 0) return cudaSuccess;
  if (!fits(n)) return cudaErrorInvalidValue;
  if (element == 4)
    mask_kernel<<<blocks_for(n), kThreads, 0, stream>>>(static_cast<uint32_t*>(x), mask, n);
  else
    mask_kernel<<<blocks_for(n), kThreads, 0, stream>>>(static_cast<uint16_t*>(x), mask, n);
  return cudaGetLastError();
}

// A thread a tile; the patterns are read by all threads of a warp at once, from shared memory.
__global__ void __launch_bounds__(kThreads)
    transposable_kernel(const float* __restrict__ scores, bool* __restrict__ kept, int64_t tiles,
                        int64_t columns, const int32_t* __restrict__ patterns, int count) {
  __shared__ int32_t own[kPatterns];
  for (int i = threadIdx.x; i < count; i += kThreads) own[i] = patterns[i];
  __syncthreads();
  const int64_t across = columns / 4, step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t tile = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; tile < tiles;
       tile += step) {
    const int64_t first = tile / across * 4 * columns + tile % across * 4;
    float value[16];
#pragma unroll
    for (int r = 0; r < 4; ++r)
#pragma unroll
      for (int c = 0; c < 4; ++c) value[4 * r + c] = scores[first + r * columns + c];
    int best = own[0];
    float most = -1.0f;  // scores are magnitudes
    for (int p = 0; p < count; ++p) {
      float sum = 0.0f;
#pragma unroll
      for (int i = 0; i < 16; ++i) sum += (own[p] >> i & 1) != 0 ? value[i] : 0.0f;
      if (sum > most) {
        most = sum;
        best = own[p];
      }
    }
#pragma unroll
    for (int r = 0; r < 4; ++r)
#pragma unroll
      for (int c = 0; c < 4; ++c) kept[first + r * columns + c] = (best >> (4 * r + c) & 1) != 0;
  }
}

cudaError_t transposable(const float* scores, bool* kept, int64_t rows, int64_t columns,
                         const int32_t* patterns, int count, cudaStream_t stream) {
  const int64_t tiles = rows / 4 * (columns / 4);
  if (tiles == 0) return cudaSuccess;
  if (count > kPatterns) return cudaErrorInvalidValue;
  transposable_kernel<<<blocks_for(tiles), kThreads, 0, stream>>>(scores, kept, tiles, columns,
                                                                   patterns, count);
  return cudaGetLastError();
}

__global__ void __launch_bounds__(kThreads)
    adamw_kernel(MaskedAdamW job, BlockMask mask, int64_t n) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < n; i += step) {
    float weight = 0.0f, m = 0.0f, v = 0.0f;
    if (is_kept(mask, i)) {
      const float g = job.grad[i];
      m = job.first[i] + (1.0f - job.beta1) * (g - job.first[i]);
      v = job.beta2 * job.second[i] + (1.0f - job.beta2) * g * g;
      weight = job.weight[i] * job.decay - job.rate * m / (sqrtf(v) * job.root + job.eps) + 0.0f;
    }
    job.weight[i] = weight;
    job.first[i] = m;
    job.second[i] = v;
  }
}

cudaError_t masked_adamw(const MaskedAdamW& job, const BlockMask& mask, cudaStream_t stream) {
  const int64_t n = mask.rows * mask.columns;
  if (n == 0) return cudaSuccess;
  if (!fits(n)) return cudaErrorInvalidValue;
  adamw_kernel<<<blocks_for(n), kThreads, 0, stream>>>(job, mask, n);
  return cudaGetLastError();
}

}  // namespace llmtrain
