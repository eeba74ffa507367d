// Norms and activations with their cast to FP8 and its transposed copy.
//
// Norms: a block of 512 threads has 32 rows. Its 16 warps first take two rows each for their
// statistics; then the block goes over the rows once more, 1024 columns at a time, from the cache
// (32 rows of 4096 are 256 KiB, of which a GPU of 132 blocks holds 34 MB in its second cache), and
// casts. Activations: tiles of 128 x 128 as in fp8.cu.
//
// Transposed copies go through shared memory in words of 4 bytes. In both, words of a row are
// exchanged by the number of the 16 rows it is in, so that neither writing (8 threads, 128 bytes of a
// row) nor reading (words of neighbouring columns, of several groups of rows) has two threads of a
// warp at one bank.
#include "fused.h"

#include "device.h"

namespace llmtrain {

// --- norms

constexpr int kRows = 32, kSpan = 1024, kNormThreads = 512, kWarps = kNormThreads / 32;
constexpr int kLane = 8;  // numbers that a lane reads at once

__device__ float warp_sum(float x) {
#pragma unroll
  for (int apart = 16; apart > 0; apart /= 2) x += __shfl_xor_sync(0xffffffffu, x, apart);
  return x;
}

// Statistics of one row by one warp; with kAdd of x + branch, which is written to total.
template <class S, bool kLayer, bool kAdd>
__device__ void row_statistics(const NormData& data, int64_t row, int64_t columns) {
  using T = typename S::Type;
  const int lane = threadIdx.x % 32;
  // Of a join the norm is that of the branch.
  const T* x = static_cast<const T*>(data.x) + row * columns;
  const T* branch = kAdd ? static_cast<const T*>(data.branch) + row * columns : nullptr;
  T* total = kAdd ? static_cast<T*>(data.total) + row * columns : nullptr;
  float sum = 0.0f;
  for (int64_t at = lane * kLane; at < columns; at += 32 * kLane) {
    __align__(16) T a[kLane], b[kLane];
    read<kLane>(x + at, a);
    if constexpr (kAdd) {
      read<kLane>(branch + at, b);
#pragma unroll
      for (int i = 0; i < kLane; ++i) a[i] = S::stored(S::number(a[i]) + S::number(b[i]));
      write<kLane>(total + at, a);
    }
#pragma unroll
    for (int i = 0; i < kLane; ++i) {
      const float v = S::number(a[i]);
      sum += kLayer ? v : v * v;
    }
  }
  const float mean = warp_sum(sum) / static_cast<float>(columns);
  float squares = mean;
  if constexpr (kLayer) {
    // Around the mean: the difference of two large sums would lose digits. A lane reads what it
    // has written itself.
    squares = 0.0f;
    const T* again = kAdd ? total : x;
    for (int64_t at = lane * kLane; at < columns; at += 32 * kLane) {
      __align__(16) T a[kLane];
      read<kLane>(again + at, a);
#pragma unroll
      for (int i = 0; i < kLane; ++i) {
        const float v = S::number(a[i]) - mean;
        squares += v * v;
      }
    }
    squares = warp_sum(squares) / static_cast<float>(columns);
  }
  if (lane == 0) {
    if constexpr (kLayer) data.mean[row] = mean;
    data.rstd[row] = rsqrtf(squares + data.eps);
  }
}

// 16 numbers of a row: normalised, joined to the stream, written and cast.
template <class S, bool kLayer, bool kJoin>
__device__ void apply(const NormData& data, int64_t row, int64_t columns, int64_t at,
                      uint8_t* codes) {
  using T = typename S::Type;
  const int64_t offset = row * columns + at;
  const bool added = !kJoin && data.branch != nullptr;
  const void* normed = kJoin ? data.branch : added ? data.total : data.x;
  __align__(16) T x[kVector], weight[kVector], bias[kVector];
  read<kVector>(static_cast<const T*>(normed) + offset, x);
  read<kVector>(static_cast<const T*>(data.weight) + at, weight);
  const bool shifted = kLayer && data.bias != nullptr;
  if (shifted) read<kVector>(static_cast<const T*>(data.bias) + at, bias);
  const float mean = kLayer ? data.mean[row] : 0.0f, rstd = data.rstd[row];
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    float y = (S::number(x[i]) - mean) * rstd * S::number(weight[i]);
    if (shifted) y += S::number(bias[i]);
    x[i] = S::stored(y);
  }
  if constexpr (kJoin) {
    __align__(16) T stream[kVector];
    read<kVector>(static_cast<const T*>(data.x) + offset, stream);
#pragma unroll
    for (int i = 0; i < kVector; ++i)
      x[i] = S::stored(fmaf(data.stay, S::number(stream[i]), S::number(x[i])));
    write<kVector>(static_cast<T*>(data.total) + offset, x);
  } else if (data.y != nullptr) {
    write<kVector>(static_cast<T*>(data.y) + offset, x);
  }
#pragma unroll
  for (int i = 0; i < kVector; ++i) codes[i] = to_fp8<false>(S::number(x[i]));
}

template <class S, bool kLayer, bool kJoin>
__global__ void __launch_bounds__(kNormThreads) norm_kernel(NormData data, Result result) {
  __shared__ __align__(16) uint32_t tile[kRows * kSpan / 4];
  const int64_t row0 = static_cast<int64_t>(blockIdx.x) * kRows;
  for (int r = threadIdx.x / 32; r < kRows; r += kWarps) {
    const int64_t row = row0 + r;
    if (row >= result.rows) break;
    if constexpr (kJoin) {
      NormData of_branch = data;
      of_branch.x = data.branch;
      row_statistics<S, kLayer, false>(of_branch, row, result.columns);
    } else if (data.branch != nullptr) {
      row_statistics<S, kLayer, true>(data, row, result.columns);
    } else {
      row_statistics<S, kLayer, false>(data, row, result.columns);
    }
  }
  __syncthreads();  // the statistics and the stream are there for the whole block
  const int r = threadIdx.x / 16, group = threadIdx.x % 16;
  const int turned_rows = threadIdx.x % 2, word = threadIdx.x / 2;
  for (int64_t first = 0; first < result.columns; first += kSpan) {
#pragma unroll
    for (int part = 0; part < kSpan / 256; ++part) {
      const int64_t row = row0 + r, at = first + part * 256 + group * kVector;
      if (row < result.rows && at < result.columns) {
        __align__(16) uint8_t codes[kVector];
        apply<S, kLayer, kJoin>(data, row, result.columns, at, codes);
        *reinterpret_cast<uint4*>(result.plain + row * result.columns + at) =
            *reinterpret_cast<const uint4*>(codes);
        const int place = (part * 64 + group * 4) ^ (r / 16 * 16);
        *reinterpret_cast<uint4*>(tile + r * (kSpan / 4) + place) =
            *reinterpret_cast<const uint4*>(codes);
      }
    }
    if (result.transposed == nullptr) continue;
    __syncthreads();
    // Two neighbours write the 32 bytes of a column.
    const int64_t row = row0 + turned_rows * 16, column = first + word * 4;
    if (row < result.rows && column < result.columns)
      put_columns(tile + turned_rows * 16 * (kSpan / 4) + (word ^ (turned_rows * 16)), kSpan / 4,
                  result.transposed + column * result.rows + row, result.rows);
    __syncthreads();
  }
}

template <class S, bool kJoin>
cudaError_t launch_norm(const NormData& data, const Result& result, cudaStream_t stream) {
  if (result.rows == 0 || result.columns == 0) return cudaSuccess;
  const int64_t blocks = (result.rows + kRows - 1) / kRows;
  if (blocks > 0x7fffffff) return cudaErrorInvalidConfiguration;
  if (data.layer)
    norm_kernel<S, true, kJoin>
        <<<static_cast<unsigned>(blocks), kNormThreads, 0, stream>>>(data, result);
  else
    norm_kernel<S, false, kJoin>
        <<<static_cast<unsigned>(blocks), kNormThreads, 0, stream>>>(data, result);
  return cudaGetLastError();
}

cudaError_t add_norm_cast(const NormData& data, const Result& result, cudaStream_t stream) {
  return data.bfloat16 ? launch_norm<Bf16, false>(data, result, stream)
                       : launch_norm<Fp32, false>(data, result, stream);
}

cudaError_t norm_join_cast(const NormData& data, const Result& result, cudaStream_t stream) {
  return data.bfloat16 ? launch_norm<Bf16, true>(data, result, stream)
                       : launch_norm<Fp32, true>(data, result, stream);
}

// --- activations

constexpr float kRootHalf = 0.70710678f, kDensity = 0.39894228f;  // 1/sqrt(2), 1/sqrt(2 pi)
constexpr float kTanh = 2.0f * 0.79788456f, kCubic = 0.044715f;   // 2 sqrt(2/pi)

// sigmoid(x) and 1 - sigmoid(x), each to its own last digits. Beyond -80 and 80 0, so that products
// with a huge x vanish.
struct Logistic {
  float value, rest;
};

__device__ Logistic logistic(float x) {
  const float e = __expf(x < -80.0f ? 80.0f : -x), r = __frcp_rn(1.0f + e);
  return {x < -80.0f ? 0.0f : r, x > 80.0f ? 0.0f : e * r};
}

__device__ float within(float x, float bound) {
  const float low = x < -bound ? -bound : x;
  return low > bound ? bound : low;
}

struct Gelu {
  static __device__ float value(float x) { return 0.5f * x * (1.0f + erff(x * kRootHalf)); }
  static __device__ float slope(float x) {
    const float t = within(x, 13.0f);
    return 0.5f * (1.0f + erff(x * kRootHalf)) + t * kDensity * __expf(-0.5f * t * t);
  }
};

struct GeluTanh {
  static __device__ float inner(float x) { return kTanh * (x + kCubic * x * x * x); }
  static __device__ float value(float x) { return x * logistic(inner(x)).value; }
  static __device__ float slope(float x) {
    const float t = within(x, 20.0f);
    const Logistic s = logistic(inner(t));
    return s.value + t * s.value * s.rest * kTanh * (1.0f + 3.0f * kCubic * t * t);
  }
};

struct Silu {
  static __device__ float value(float x) { return x * logistic(x).value; }
  static __device__ float slope(float x) {
    const Logistic s = logistic(x);
    return s.value * (1.0f + x * s.rest);
  }
};

struct Relu {
  static __device__ float value(float x) { return x < 0.0f ? 0.0f : x; }
  static __device__ float slope(float x) { return x <= 0.0f ? 0.0f : 1.0f; }
};

struct Swiglu {};

struct ActivationData {
  const void *x, *dy;
  void* out;  // y or dx; y may be null
  float factor;
};

// 16 results of a row in e4m3. columns: of the result.
template <class S, class A>
struct Forward {
  static __device__ void run(const ActivationData& data, int64_t offset, uint8_t* codes) {
    using T = typename S::Type;
    __align__(16) T x[kVector];
    read<kVector>(static_cast<const T*>(data.x) + offset, x);
#pragma unroll
    for (int i = 0; i < kVector; ++i) x[i] = S::stored(A::value(S::number(x[i])));
    if (data.out != nullptr) write<kVector>(static_cast<T*>(data.out) + offset, x);
#pragma unroll
    for (int i = 0; i < kVector; ++i) codes[i] = to_fp8<false>(S::number(x[i]));
  }
};

template <class S>
struct Forward<S, Swiglu> {
  static __device__ void run(const ActivationData& data, int64_t offset, uint8_t* codes) {
    using T = typename S::Type;
    __align__(16) T pairs[2 * kVector], y[kVector];
    read<2 * kVector>(static_cast<const T*>(data.x) + 2 * offset, pairs);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const float gate = S::number(pairs[2 * i]);
      y[i] = S::stored(gate * logistic(gate).value * S::number(pairs[2 * i + 1]));
    }
    if (data.out != nullptr) write<kVector>(static_cast<T*>(data.out) + offset, y);
#pragma unroll
    for (int i = 0; i < kVector; ++i) codes[i] = to_fp8<false>(S::number(y[i]));
  }
};

// factor times 16 gradients in e5m2, rounded to the type in between as the separate passes do.
template <class S>
__device__ void cast_gradient(const typename S::Type* dx, float factor, uint8_t* codes) {
#pragma unroll
  for (int i = 0; i < kVector; ++i)
    codes[i] = to_fp8<true>(S::number(S::stored(S::number(dx[i]) * factor)));
}

template <class S, class A>
struct Backward {
  static __device__ void run(const ActivationData& data, int64_t offset, uint8_t* codes) {
    using T = typename S::Type;
    __align__(16) T x[kVector], dy[kVector];
    read<kVector>(static_cast<const T*>(data.x) + offset, x);
    read<kVector>(static_cast<const T*>(data.dy) + offset, dy);
#pragma unroll
    for (int i = 0; i < kVector; ++i)
      x[i] = S::stored(S::number(dy[i]) * A::slope(S::number(x[i])));
    write<kVector>(static_cast<T*>(data.out) + offset, x);
    cast_gradient<S>(x, data.factor, codes);
  }
};

// 16 gradients are those of 8 pairs.
template <class S>
struct Backward<S, Swiglu> {
  static __device__ void run(const ActivationData& data, int64_t offset, uint8_t* codes) {
    using T = typename S::Type;
    __align__(16) T x[kVector], dy[kVector / 2];
    read<kVector>(static_cast<const T*>(data.x) + offset, x);
    read<kVector / 2>(static_cast<const T*>(data.dy) + offset / 2, dy);
#pragma unroll
    for (int i = 0; i < kVector / 2; ++i) {
      const float gate = S::number(x[2 * i]), up = S::number(x[2 * i + 1]);
      const float grad = S::number(dy[i]);
      const Logistic s = logistic(gate);
      x[2 * i] = S::stored(grad * up * s.value * (1.0f + gate * s.rest));
      x[2 * i + 1] = S::stored(grad * gate * s.value);
    }
    write<kVector>(static_cast<T*>(data.out) + offset, x);
    cast_gradient<S>(x, data.factor, codes);
  }
};

constexpr int kTile = 128, kThreads = 256;

// P: Forward or Backward, which makes 16 codes of the result at an offset.
template <class P>
__global__ void __launch_bounds__(kThreads) activation_kernel(ActivationData data, Result result) {
  __shared__ __align__(16) uint32_t tile[kTile * kTile / 4];
  const int64_t across = (result.columns + kTile - 1) / kTile;
  const int64_t row0 = blockIdx.x / across * kTile, column0 = blockIdx.x % across * kTile;
  const int group = threadIdx.x % 8;  // of 16 columns
#pragma unroll
  for (int pass = 0; pass < 4; ++pass) {
    const int r = pass * 32 + threadIdx.x / 8;
    const int64_t row = row0 + r, column = column0 + group * kVector;
    if (row < result.rows && column < result.columns) {
      const int64_t offset = row * result.columns + column;
      __align__(16) uint8_t codes[kVector];
      P::run(data, offset, codes);
      *reinterpret_cast<uint4*>(result.plain + offset) = *reinterpret_cast<const uint4*>(codes);
      reinterpret_cast<uint4*>(tile)[r * 8 + (group ^ (r / 16))] =
          *reinterpret_cast<const uint4*>(codes);
    }
  }
  if (result.transposed == nullptr) return;  // alike for all threads
  __syncthreads();
  // 8 neighbours write 128 bytes of a column.
  const int rows16 = threadIdx.x % 8, word = threadIdx.x / 8;
  const int64_t row = row0 + rows16 * kVector, column = column0 + word * 4;
  if (row < result.rows && column < result.columns)
    put_columns(tile + rows16 * kVector * (kTile / 4) + (word ^ (rows16 * 4)), kTile / 4,
                result.transposed + column * result.rows + row, result.rows);
}

template <class P>
cudaError_t launch(const ActivationData& data, const Result& result, cudaStream_t stream) {
  if (result.rows == 0 || result.columns == 0) return cudaSuccess;
  const int64_t tiles = ((result.rows + kTile - 1) / kTile) * ((result.columns + kTile - 1) / kTile);
  if (tiles > 0x7fffffff) return cudaErrorInvalidConfiguration;
  activation_kernel<P><<<static_cast<unsigned>(tiles), kThreads, 0, stream>>>(data, result);
  return cudaGetLastError();
}

template <template <class, class> class P, class S>
cudaError_t launch_kind(const ActivationData& data, int64_t activation, const Result& result,
                        cudaStream_t stream) {
  switch (activation) {
    case kGelu: return launch<P<S, Gelu>>(data, result, stream);
    case kGeluTanh: return launch<P<S, GeluTanh>>(data, result, stream);
    case kSilu: return launch<P<S, Silu>>(data, result, stream);
    case kRelu: return launch<P<S, Relu>>(data, result, stream);
    case kSwiglu: return launch<P<S, Swiglu>>(data, result, stream);
    default: return cudaErrorInvalidValue;
  }
}

cudaError_t activation_cast(const void* x, void* y, bool bfloat16, int64_t activation,
                            const Result& result, cudaStream_t stream) {
  const ActivationData data{x, nullptr, y, 1.0f};
  return bfloat16 ? launch_kind<Forward, Bf16>(data, activation, result, stream)
                  : launch_kind<Forward, Fp32>(data, activation, result, stream);
}

cudaError_t activation_backward_cast(const void* dy, const void* x, void* dx, bool bfloat16,
                                     int64_t activation, float factor, const Result& result,
                                     cudaStream_t stream) {
  const ActivationData data{x, dy, dx, factor};
  return bfloat16 ? launch_kind<Backward, Bf16>(data, activation, result, stream)
                  : launch_kind<Backward, Fp32>(data, activation, result, stream);
}

}  // namespace llmtrain
