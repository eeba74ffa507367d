// Transposes of blocks of numbers, float32 or bfloat16, for the sparse products.
// Included once per instruction set, inside its namespace (KERNEL_SET).
#pragma once

#include "number.h"
#include "sparse_vec.h"
#ifdef __AVX2__
#include "transpose8.h"
#endif

namespace KERNEL_SET {

#ifdef __AVX2__
inline __m256 load8(const float* x) { return _mm256_loadu_ps(x); }
inline __m256 load8(const bf16* x) {
  const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
}
inline void store8(float* out, __m256 x) { _mm256_storeu_ps(out, x); }
inline void store8(bf16* out, __m256 x) {
  float values[8];
  _mm256_storeu_ps(values, x);
  for (int i = 0; i < 8; ++i) store(out[i], values[i]);
}

template <class A, class B>
inline void turn8(const A* x, int64_t stride, B* out, int64_t out_stride) {
  __m256 r[8];
  for (int i = 0; i < 8; ++i) r[i] = load8(x + i * stride);
  transpose8(r);
  for (int i = 0; i < 8; ++i) store8(out + i * out_stride, r[i]);
}
#else
template <class A, class B>
inline void turn8(const A* x, int64_t stride, B* out, int64_t out_stride) {
  for (int i = 0; i < 8; ++i)
    for (int j = 0; j < 8; ++j) store(out[j * out_stride + i], load(x[i * stride + j]));
}
#endif

// x [rows, columns] -> out [columns, rows], rows `stride` and `out_stride` apart.
template <class A, class B>
void turn_block(const A* x, int64_t stride, int64_t rows, int64_t columns, B* out,
                int64_t out_stride) {
  constexpr int64_t kLine = 16;  // columns of a row that share a cache line
  for (int64_t c = 0; c < columns; c += kLine) {
    const int64_t stop = at_most(c + kLine, columns);
    for (int64_t r = 0; r < rows; r += 8) {
      const int64_t last = at_most(r + 8, rows);
      int64_t d = c;
      if (last - r == 8)
        for (; d + 8 <= stop; d += 8)
          turn8(x + r * stride + d, stride, out + d * out_stride + r, out_stride);
      for (int64_t i = r; i < last; ++i)
        for (int64_t j = d; j < stop; ++j) store(out[j * out_stride + i], load(x[i * stride + j]));
    }
  }
}

// `count` tokens of x [.., columns] -> out [padded, width], 0 where there is no token or column.
template <class T>
void turn_tokens(const T* x, int64_t count, int64_t columns, int64_t padded, int64_t width,
                 float* out) {
  turn_block(x, columns, count, columns, out, width);
  if (count < width)
    for (int64_t c = 0; c < columns; ++c)
      for (int64_t t = count; t < width; ++t) out[c * width + t] = 0.0f;
  for (int64_t i = columns * width; i < padded * width; ++i) out[i] = 0.0f;
}

}  // namespace KERNEL_SET
