// Products of block-sparse weights on tensor cores. A block of threads makes 128 tokens by 64
// columns of a result, or one tile of a weight's gradient, and walks over the kept tiles (the
// tokens) in steps of 32; three or four steps are under way from global memory at a time. Rows in
// shared memory are 16 bytes longer than their data, so that the eight rows of a matrix that a warp
// loads lie in different banks.
#include "blocks.h"

#include "tensor_core.h"

namespace llmtrain {

constexpr int kThreads = 128, kTokens = 128, kStep = 32, kChunk = 8;
constexpr int kNarrow = kStep + kChunk, kWide = kTile + kChunk;  // pitches in elements

// A matrix [rows, columns] in global memory.
struct Matrix {
  const __nv_bfloat16* data;
  int64_t rows, columns;
};

// The box of kRows x kColumns at (top, left) into shared memory, rows `kPitch` apart, zeros beyond
// the matrix. Columns of the matrix and `left` are multiples of 8.
template <int kRows, int kColumns, int kPitch>
__device__ void copy_box(__nv_bfloat16* to, const Matrix& from, int64_t top, int64_t left) {
  constexpr int kAcross = kColumns / kChunk;
#pragma unroll
  for (int i = 0; i < kRows * kAcross / kThreads; ++i) {
    const int chunk = i * kThreads + static_cast<int>(threadIdx.x);
    const int row = chunk / kAcross, column = chunk % kAcross * kChunk;
    const bool real = top + row < from.rows && left + column < from.columns;
    const int64_t at = real ? (top + row) * from.columns + left + column : 0;
    copy16(to + row * kPitch + column, from.data + at, real);
  }
}

// The operands of `multiply`, as a lane addresses them in shared memory.

// 16 rows by 16 columns of rows: the left operand as it is stored.
template <int kPitch>
__device__ const __nv_bfloat16* left_row(const __nv_bfloat16* box, int row, int depth, int lane) {
  return box + (row + lane % 16) * kPitch + depth + lane / 16 * 8;
}

// The left operand stored transposed: rows are depth.
template <int kPitch>
__device__ const __nv_bfloat16* left_column(const __nv_bfloat16* box, int row, int depth,
                                            int lane) {
  return box + (depth + lane % 8 + lane / 16 * 8) * kPitch + row + lane / 8 % 2 * 8;
}

// Two right operands, 16 columns, stored transposed: rows are columns.
template <int kPitch>
__device__ const __nv_bfloat16* right_column(const __nv_bfloat16* box, int column, int depth,
                                             int lane) {
  return box + (column + lane % 8 + lane / 16 * 8) * kPitch + depth + lane / 8 % 2 * 8;
}

// The same stored as they are: rows are depth.
template <int kPitch>
__device__ const __nv_bfloat16* right_row(const __nv_bfloat16* box, int column, int depth,
                                          int lane) {
  return box + (depth + lane % 8 + lane / 8 % 2 * 8) * kPitch + column + lane / 16 * 8;
}

template <bool kTurned>
__global__ void __launch_bounds__(kThreads)
    block_product_kernel(BlockProduct job, int64_t bands) {
  constexpr int kStages = 3;
  __shared__ __align__(16) __nv_bfloat16 tokens[kStages][kTokens * kNarrow];
  __shared__ __align__(16) __nv_bfloat16 weights[kStages][kTile * kNarrow];
  static_assert(kStep * kWide <= kTile * kNarrow, "a half tile fits either way");
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int64_t band = blockIdx.x % bands, top = blockIdx.x / bands * kTokens;
  const int first = job.starts[band], steps = 2 * (job.starts[band + 1] - first);
  const Matrix x{job.x, job.n, job.depth};

  const auto fetch = [&](int step) {
    if (step < steps) {
      const int tile = first + step / 2, half = step % 2 * kStep, stage = step % kStages;
      const int64_t left = static_cast<int64_t>(job.others[tile]) * kTile + half;
      copy_box<kTokens, kStep, kNarrow>(tokens[stage], x, top, left);
      const Matrix w{job.values + static_cast<int64_t>(job.place[tile]) * kTile * kTile, kTile,
                     kTile};
      if constexpr (kTurned)
        copy_box<kStep, kTile, kWide>(weights[stage], w, half, 0);
      else
        copy_box<kTile, kStep, kNarrow>(weights[stage], w, 0, half);
    }
    end_group();  // empty at the end, so that the count of groups stays right
  };

  float sums[2][8][4] = {};
  for (int step = 0; step < kStages - 1; ++step) fetch(step);
  for (int step = 0; step < steps; ++step) {
    wait_groups<kStages - 2>();
    __syncthreads();  // all copies of this step are there, and nobody reads the step before
    fetch(step + kStages - 1);
    const __nv_bfloat16 *a = tokens[step % kStages], *b = weights[step % kStages];
#pragma unroll
    for (int depth = 0; depth < kStep; depth += 16) {
      uint32_t left[2][4], right[4][4];
#pragma unroll
      for (int i = 0; i < 2; ++i)
        load_matrices(left[i], left_row<kNarrow>(a, 32 * warp + 16 * i, depth, lane));
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if constexpr (kTurned)
          load_transposed(right[j], right_row<kWide>(b, 16 * j, depth, lane));
        else
          load_matrices(right[j], right_column<kNarrow>(b, 16 * j, depth, lane));
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int j = 0; j < 8; ++j)
          multiply(sums[i][j], left[i], right[j / 2][j % 2 * 2], right[j / 2][j % 2 * 2 + 1]);
    }
  }

#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const int64_t column = band * kTile + 8 * j + lane % 4 * 2;
      if (column >= job.width) continue;
      const float low = job.bias == nullptr ? 0.0f : __bfloat162float(job.bias[column]);
      const float high = job.bias == nullptr ? 0.0f : __bfloat162float(job.bias[column + 1]);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t row = top + 32 * warp + 16 * i + 8 * half + lane / 4;
        if (row >= job.n) continue;
        const float* pair = sums[i][j] + 2 * half;
        *reinterpret_cast<__nv_bfloat162*>(job.y + row * job.width + column) =
            __floats2bfloat162_rn(job.scale * pair[0] + low, job.scale * pair[1] + high);
      }
    }
}

cudaError_t block_product(const BlockProduct& job, bool turned, cudaStream_t stream) {
  const int64_t bands = (job.width + kTile - 1) / kTile;
  const int64_t blocks = (job.n + kTokens - 1) / kTokens * bands;
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  const auto grid = static_cast<unsigned>(blocks);
  if (turned)
    block_product_kernel<true><<<grid, kThreads, 0, stream>>>(job, bands);
  else
    block_product_kernel<false><<<grid, kThreads, 0, stream>>>(job, bands);
  return cudaGetLastError();
}

// Two neighbouring sums into the result, unless the tile sticks out there.
__device__ void add_pair(const BlockGradient& job, int64_t row, int64_t column, float2 pair) {
  if (row >= job.rows || column >= job.cols) return;
  auto* at = reinterpret_cast<float2*>(job.out + row * job.cols + column);
  const float2 old = *at;
  *at = make_float2(old.x + job.scale * pair.x, old.y + job.scale * pair.y);
}

__global__ void __launch_bounds__(kThreads) block_gradient_kernel(BlockGradient job) {
  constexpr int kStages = 4;
  __shared__ __align__(16) __nv_bfloat16 lefts[kStages][kStep * kWide];
  __shared__ __align__(16) __nv_bfloat16 rights[kStages][kStep * kWide];
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int down = warp / 2 * 32, across = warp % 2 * 32;  // this warp's quarter of the tile
  const int64_t tile = blockIdx.x % job.tiles, part = blockIdx.x / job.tiles;
  const int64_t top = static_cast<int64_t>(job.rows_of[tile]) * kTile;
  const int64_t left = static_cast<int64_t>(job.cols_of[tile]) * kTile;
  const int64_t all = (job.n + kStep - 1) / kStep;
  const int64_t first = part * all / job.parts, steps = (part + 1) * all / job.parts - first;
  const Matrix dy{job.dy, job.n, job.rows}, x{job.x, job.n, job.cols};

  const auto fetch = [&](int64_t step) {
    if (step < steps) {
      const int64_t token = (first + step) * kStep;
      copy_box<kStep, kTile, kWide>(lefts[step % kStages], dy, token, top);
      copy_box<kStep, kTile, kWide>(rights[step % kStages], x, token, left);
    }
    end_group();
  };

  float sums[2][4][4] = {};
  for (int64_t step = 0; step < kStages - 1; ++step) fetch(step);
  for (int64_t step = 0; step < steps; ++step) {
    wait_groups<kStages - 2>();
    __syncthreads();
    fetch(step + kStages - 1);
    const __nv_bfloat16 *a = lefts[step % kStages], *b = rights[step % kStages];
#pragma unroll
    for (int depth = 0; depth < kStep; depth += 16) {
      uint32_t l[2][4], r[2][4];
#pragma unroll
      for (int i = 0; i < 2; ++i)
        load_transposed(l[i], left_column<kWide>(a, down + 16 * i, depth, lane));
#pragma unroll
      for (int j = 0; j < 2; ++j)
        load_transposed(r[j], right_row<kWide>(b, across + 16 * j, depth, lane));
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j)
          multiply(sums[i][j], l[i], r[j / 2][j % 2 * 2], r[j / 2][j % 2 * 2 + 1]);
    }
  }

#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = down + 16 * i + 8 * half + lane / 4, column = across + 8 * j + lane % 4 * 2;
        const float2 pair = make_float2(sums[i][j][2 * half], sums[i][j][2 * half + 1]);
        if (job.parts == 1)
          add_pair(job, top + row, left + column, pair);
        else
          *reinterpret_cast<float2*>(job.partial + ((part * job.tiles + tile) * kTile + row) * kTile +
                                     column) = pair;
      }
}

// The sums of all parts of a tile, in their order.
__global__ void __launch_bounds__(kThreads) block_sum_kernel(BlockGradient job) {
  const int64_t tile = blockIdx.x;
  const int64_t top = static_cast<int64_t>(job.rows_of[tile]) * kTile;
  const int64_t left = static_cast<int64_t>(job.cols_of[tile]) * kTile;
  for (int i = static_cast<int>(threadIdx.x); i < kTile * kTile / 2; i += kThreads) {
    const int row = i / (kTile / 2), column = i % (kTile / 2) * 2;
    float2 sum = make_float2(0.0f, 0.0f);
    for (int64_t part = 0; part < job.parts; ++part) {
      const float2 own = *reinterpret_cast<const float2*>(
          job.partial + ((part * job.tiles + tile) * kTile + row) * kTile + column);
      sum = make_float2(sum.x + own.x, sum.y + own.y);
    }
    add_pair(job, top + row, left + column, sum);
  }
}

int64_t gradient_parts(int64_t n, int64_t tiles) {
  constexpr int64_t kWanted = 528, kFewest = 512;  // blocks of threads, tokens of a part
  const int64_t most = n / kFewest, fill = tiles == 0 ? 1 : kWanted / tiles;
  const int64_t parts = fill < most ? fill : most;
  return parts < 1 ? 1 : parts;
}

cudaError_t block_gradient(const BlockGradient& job, cudaStream_t stream) {
  if (job.tiles == 0 || job.n == 0) return cudaSuccess;
  const int64_t blocks = job.tiles * job.parts;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  const auto grid = static_cast<unsigned>(blocks), tiles = static_cast<unsigned>(job.tiles);
  block_gradient_kernel<<<grid, kThreads, 0, stream>>>(job);
  if (job.parts > 1) block_sum_kernel<<<tiles, kThreads, 0, stream>>>(job);
  return cudaGetLastError();
}

// A block of threads a tile; a thread eight numbers of a row at a time.
template <class T>
__global__ void __launch_bounds__(kThreads) block_pack_kernel(BlockPack job) {
  const int64_t tile = blockIdx.x;
  const int64_t top = static_cast<int64_t>(job.rows_of[tile]) * kTile;
  const int64_t left = static_cast<int64_t>(job.cols_of[tile]) * kTile;
  const T* weight = static_cast<const T*>(job.weight);
  for (int chunk = static_cast<int>(threadIdx.x); chunk < kTile * kTile / kChunk;
       chunk += kThreads) {
    const int row = chunk / (kTile / kChunk), column = chunk % (kTile / kChunk) * kChunk;
    const bool real = top + row < job.rows && left + column < job.cols;
    const T* from = weight + (top + row) * job.cols + left + column;
    __align__(16) __nv_bfloat16 out[kChunk];
#pragma unroll
    for (int i = 0; i < kChunk; ++i)  // x + 0 is +0.0 for either zero
      out[i] = __float2bfloat16_rn((real ? static_cast<float>(from[i]) : 0.0f) + 0.0f);
    auto* to = job.values + tile * kTile * kTile + row * kTile + column;
    *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(out);
  }
}

cudaError_t block_pack(const BlockPack& job, cudaStream_t stream) {
  if (job.tiles == 0) return cudaSuccess;
  const auto grid = static_cast<unsigned>(job.tiles);
  if (job.bfloat16)
    block_pack_kernel<__nv_bfloat16><<<grid, kThreads, 0, stream>>>(job);
  else
    block_pack_kernel<float><<<grid, kThreads, 0, stream>>>(job);
  return cudaGetLastError();
}

}  // namespace llmtrain
