// What the kernels share: 16 numbers of a row at a time, casts, and turning bytes in registers.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace llmtrain {

constexpr int kVector = 16;

struct Bf16 {
  using Type = __nv_bfloat16;
  static __device__ float number(__nv_bfloat16 x) { return __bfloat162float(x); }
  static __device__ __nv_bfloat16 stored(float x) { return __float2bfloat16_rn(x); }
};

struct Fp32 {
  using Type = float;
  static __device__ float number(float x) { return x; }
  static __device__ float stored(float x) { return x; }
};

// Master weights in float32 that products read in bfloat16: rounded to it before the cast.
struct Master {
  using Type = float;
  static __device__ float number(float x) {
    return __bfloat162float(__float2bfloat16_rn(x));
  }
};

// FP8 tensors, which are only transposed.
struct Byte {
  using Type = uint8_t;
};

// Saturating, to nearest even; infinities become the largest number; NaN becomes 0x7f, for which
// the two formats' own conversions have several codes.
template <bool kE5M2>
__device__ uint8_t to_fp8(float x) {
  const auto code = __nv_cvt_float_to_fp8(x, __NV_SATFINITE, kE5M2 ? __NV_E5M2 : __NV_E4M3);
  return x != x ? uint8_t{0x7f} : static_cast<uint8_t>(code);
}

// N numbers from an address that is a multiple of 16 bytes; N * sizeof(T) is one, too.
template <int N, class T>
__device__ void read(const T* from, T* to) {
#pragma unroll
  for (int i = 0; i < static_cast<int>(N * sizeof(T) / 16); ++i)
    reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(from)[i];
}

template <int N, class T>
__device__ void write(T* to, const T* from) {
#pragma unroll
  for (int i = 0; i < static_cast<int>(N * sizeof(T) / 16); ++i)
    reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(from)[i];
}

// 4 rows of 4 bytes -> 4 columns of 4 bytes, in place.
__device__ inline void turn(uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d) {
  const uint32_t ab01 = __byte_perm(a, b, 0x5140), ab23 = __byte_perm(a, b, 0x7362);
  const uint32_t cd01 = __byte_perm(c, d, 0x5140), cd23 = __byte_perm(c, d, 0x7362);
  a = __byte_perm(ab01, cd01, 0x5410);
  b = __byte_perm(ab01, cd01, 0x7632);
  c = __byte_perm(ab23, cd23, 0x5410);
  d = __byte_perm(ab23, cd23, 0x7632);
}

// 16 rows of 4 bytes, `step` words apart -> 16 bytes of each of the 4 columns, `apart` bytes apart.
__device__ inline void put_columns(const uint32_t* from, int step, uint8_t* to, int64_t apart) {
  uint32_t bytes[16];
#pragma unroll
  for (int i = 0; i < 16; ++i) bytes[i] = from[i * step];
#pragma unroll
  for (int i = 0; i < 16; i += 4) turn(bytes[i], bytes[i + 1], bytes[i + 2], bytes[i + 3]);
#pragma unroll
  for (int j = 0; j < 4; ++j)
    *reinterpret_cast<uint4*>(to + j * apart) =
        make_uint4(bytes[j], bytes[4 + j], bytes[8 + j], bytes[12 + j]);
}

}  // namespace llmtrain
