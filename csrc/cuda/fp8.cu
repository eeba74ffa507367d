// Clip, cast and transpose to FP8: one read, two writes, 16 bytes an access.
//
// A block of 256 threads turns tiles of 128 x 128. A thread casts 16 neighbours of a row, writes
// them, and puts them into shared memory; then it takes 4 columns of 16 rows from there, turns
// them in registers, and writes 16 bytes of each column. Shared memory is addressed in words of 4
// bytes; groups of 4 words are exchanged within a row by the number of the 16 rows it is in, so
// that neither side has two threads of a warp at one bank (128 bytes are 32 banks; 8 row groups
// times 4 words are 32).
#include "fp8.h"

#include "device.h"

namespace llmtrain {

constexpr int kTile = 128, kThreads = 256;

// 16 numbers, or as many as `count` says, of which the rest is 0.
template <class S, bool kE5M2>
struct Cast {
  static __device__ void run(const typename S::Type* x, int count, bool whole, float factor,
                             uint8_t* codes) {
    using T = typename S::Type;
    __align__(16) T values[kVector];
    if (whole) {
      constexpr int kLoads = kVector * sizeof(T) / 16;
#pragma unroll
      for (int i = 0; i < kLoads; ++i)
        reinterpret_cast<uint4*>(values)[i] = __ldg(reinterpret_cast<const uint4*>(x) + i);
    } else {
#pragma unroll
      for (int i = 0; i < kVector; ++i) values[i] = i < count ? x[i] : T{};
    }
#pragma unroll
    for (int i = 0; i < kVector; ++i) codes[i] = to_fp8<kE5M2>(S::number(values[i]) * factor);
  }
};

template <bool kE5M2>
struct Cast<Byte, kE5M2> {
  static __device__ void run(const uint8_t* x, int count, bool whole, float, uint8_t* codes) {
    if (whole) {
      *reinterpret_cast<uint4*>(codes) = __ldg(reinterpret_cast<const uint4*>(x));
    } else {
#pragma unroll
      for (int i = 0; i < kVector; ++i) codes[i] = i < count ? x[i] : uint8_t{0};
    }
  }
};

__device__ void put(uint8_t* to, const uint8_t* codes, int count, bool whole) {
  if (whole) {
    *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(codes);
  } else {
#pragma unroll
    for (int i = 0; i < kVector; ++i)
      if (i < count) to[i] = codes[i];
  }
}

__device__ int at_most(int64_t left) {
  return left < 0 ? 0 : left > kVector ? kVector : static_cast<int>(left);
}

// aligned_rows: rows of x and out begin at multiples of 16 elements; aligned_columns: those of
// `transposed` do. out may be null.
template <class S, bool kE5M2>
__global__ void __launch_bounds__(kThreads)
    cast_transpose_kernel(const typename S::Type* __restrict__ x, uint8_t* __restrict__ out,
                          uint8_t* __restrict__ transposed, int64_t rows, int64_t columns,
                          float factor, bool aligned_rows, bool aligned_columns) {
  __shared__ __align__(16) uint32_t tile[kTile * kTile / 4];
  const int64_t across = (columns + kTile - 1) / kTile;
  const int64_t row0 = blockIdx.x / across * kTile, column0 = blockIdx.x % across * kTile;
  const int group = threadIdx.x % 8;  // of 16 columns
#pragma unroll
  for (int pass = 0; pass < 4; ++pass) {
    const int r = pass * 32 + threadIdx.x / 8;
    const int64_t row = row0 + r, column = column0 + group * kVector;
    const int count = row < rows ? at_most(columns - column) : 0;
    const bool whole = aligned_rows && count == kVector;
    __align__(16) uint8_t codes[kVector];
    Cast<S, kE5M2>::run(x + row * columns + column, count, whole, factor, codes);
    if (out != nullptr) put(out + row * columns + column, codes, count, whole);
    reinterpret_cast<uint4*>(tile)[r * 8 + (group ^ (r / 16))] =
        *reinterpret_cast<const uint4*>(codes);
  }
  __syncthreads();
  // 8 neighbours write 128 bytes of a column.
  const int rows16 = threadIdx.x % 8, word = threadIdx.x / 8;
  uint32_t bytes[16];
#pragma unroll
  for (int i = 0; i < 16; ++i)
    bytes[i] = tile[(rows16 * 16 + i) * 32 + (word ^ (rows16 * 4))];
#pragma unroll
  for (int i = 0; i < 16; i += 4) turn(bytes[i], bytes[i + 1], bytes[i + 2], bytes[i + 3]);
  const int64_t row = row0 + rows16 * kVector;
  const int count = at_most(rows - row);
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int64_t column = column0 + word * 4 + j;
    if (column >= columns) break;
    __align__(16) uint32_t codes[4] = {bytes[j], bytes[4 + j], bytes[8 + j], bytes[12 + j]};
    put(transposed + column * rows + row, reinterpret_cast<const uint8_t*>(codes), count,
        aligned_columns && count == kVector);
  }
}

template <class S, bool kE5M2>
__global__ void __launch_bounds__(kThreads)
    cast_kernel(const typename S::Type* __restrict__ x, uint8_t* __restrict__ out, int64_t n,
                float factor, bool aligned) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads * kVector;
  for (int64_t i = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kVector; i < n;
       i += step) {
    const int count = at_most(n - i);
    const bool whole = aligned && count == kVector;
    __align__(16) uint8_t codes[kVector];
    Cast<S, kE5M2>::run(x + i, count, whole, factor, codes);
    put(out + i, codes, count, whole);
  }
}

bool aligned16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

template <class S, bool kE5M2>
cudaError_t launch(const Source& x, uint8_t* out, uint8_t* transposed, int64_t rows,
                   int64_t columns, cudaStream_t stream) {
  if (rows == 0 || columns == 0) return cudaSuccess;
  const int64_t tiles = ((rows + kTile - 1) / kTile) * ((columns + kTile - 1) / kTile);
  if (tiles > 0x7fffffff) return cudaErrorInvalidConfiguration;
  const bool by_rows = columns % kVector == 0 && aligned16(x.data) && aligned16(out);
  const bool by_columns = rows % kVector == 0 && aligned16(transposed);
  cast_transpose_kernel<S, kE5M2><<<static_cast<unsigned>(tiles), kThreads, 0, stream>>>(
      static_cast<const typename S::Type*>(x.data), out, transposed, rows, columns, x.factor,
      by_rows, by_columns);
  return cudaGetLastError();
}

template <class S, bool kE5M2>
cudaError_t launch_cast(const Source& x, uint8_t* out, int64_t n, cudaStream_t stream) {
  if (n == 0) return cudaSuccess;
  const int64_t blocks = (n + kThreads * kVector - 1) / (kThreads * kVector);
  const auto grid = static_cast<unsigned>(blocks < (1 << 20) ? blocks : 1 << 20);
  cast_kernel<S, kE5M2><<<grid, kThreads, 0, stream>>>(
      static_cast<const typename S::Type*>(x.data), out, n, x.factor,
      aligned16(x.data) && aligned16(out));
  return cudaGetLastError();
}

cudaError_t probe() {
  cudaFuncAttributes found;
  return cudaFuncGetAttributes(&found, cast_kernel<Bf16, false>);
}

cudaError_t cast(const Source& x, uint8_t* out, int64_t n, bool e5m2, cudaStream_t stream) {
  if (x.bfloat16)
    return e5m2 ? launch_cast<Bf16, true>(x, out, n, stream)
                : launch_cast<Bf16, false>(x, out, n, stream);
  return e5m2 ? launch_cast<Fp32, true>(x, out, n, stream)
              : launch_cast<Fp32, false>(x, out, n, stream);
}

cudaError_t cast_transpose(const Source& x, uint8_t* out, uint8_t* transposed, int64_t rows,
                           int64_t columns, bool e5m2, cudaStream_t stream) {
  if (x.master)
    return e5m2 ? launch<Master, true>(x, out, transposed, rows, columns, stream)
                : launch<Master, false>(x, out, transposed, rows, columns, stream);
  if (x.bfloat16)
    return e5m2 ? launch<Bf16, true>(x, out, transposed, rows, columns, stream)
                : launch<Bf16, false>(x, out, transposed, rows, columns, stream);
  return e5m2 ? launch<Fp32, true>(x, out, transposed, rows, columns, stream)
              : launch<Fp32, false>(x, out, transposed, rows, columns, stream);
}

cudaError_t transpose(const uint8_t* x, uint8_t* out, int64_t rows, int64_t columns,
                      cudaStream_t stream) {
  return launch<Byte, false>({x, false, 1.0f, false}, nullptr, out, rows, columns, stream);
}

}  // namespace llmtrain
