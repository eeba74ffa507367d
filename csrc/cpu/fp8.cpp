// Conversions to and from FP8 in plain integer loops that the compiler vectorises. Compiled once
// per instruction set with KERNEL_SET naming its namespace (see rows.cpp).
//
// Rounding to nearest even drops the low `s` bits of a number's pattern after adding half of their
// unit, one less where the bit above them is even; exponent and mantissa are one integer, so a
// carry is right by itself. Below the smallest normal number the unit is fixed, and the steps are
// found by another way.
#include "fp8.h"

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace KERNEL_SET {

using llmtrain::bf16;

// The two formats of OCP's FP8 specification. Patterns of bf16 without the sign.
struct E4M3 {
  static constexpr int kMantissa = 3, kRebias = 120;  // 127 - 7
  static constexpr int kMax = 0x43e0;                 // 448
  static constexpr int kMinNormal = 0x3c80;           // 2^-6
  static constexpr int kFirstNan = 0x7f;
  static constexpr float kUnit = 0x1p-9f;  // the smallest subnormal
  // Subnormals: a number is as many units as borders between neighbours lie below it. A border
  // is the middle, .5, 1.5, 2.5 ... units, and belongs to the even neighbour.
  static constexpr int kBorders = 8;
  static constexpr int16_t kBelow[] = {0x3a80, 0x3b3f, 0x3ba0, 0x3bdf, 0x3c10, 0x3c2f, 0x3c50,
                                       0x3c6f};
};

struct E5M2 {
  static constexpr int kMantissa = 2, kRebias = 112;  // 127 - 15
  static constexpr int kMax = 0x4760;                 // 57344
  static constexpr int kMinNormal = 0x3880;           // 2^-14
  static constexpr int kFirstNan = 0x7d;
  static constexpr float kUnit = 0x1p-16f;
  static constexpr int kBorders = 4;
  static constexpr int16_t kBelow[] = {0x3700, 0x37bf, 0x3820, 0x385f};
};

// As many 16-bit lanes as a register has: plain loops over 16-bit numbers are widened to 32.
#if defined(__AVX512BW__)
constexpr int kLanes = 32;
#elif defined(__AVX2__)
constexpr int kLanes = 16;
#else
constexpr int kLanes = 8;
#endif
typedef int16_t Shorts __attribute__((vector_size(2 * kLanes)));
typedef int16_t LooseShorts __attribute__((vector_size(2 * kLanes), aligned(2), may_alias));
typedef uint8_t HalfBytes __attribute__((vector_size(kLanes)));
typedef uint8_t LooseBytes __attribute__((vector_size(kLanes), aligned(1), may_alias));

// V: a vector of 16-bit lanes. Comparisons give -1 where they hold.
template <class F, class V>
inline V code_of(V bits) {
  constexpr int kDrop = 7 - F::kMantissa;
  const V magnitude = bits & 0x7fff;
  const V u = magnitude < F::kMax ? magnitude : magnitude - magnitude + F::kMax;
  const V normal = ((u + ((1 << (kDrop - 1)) - 1) + ((u >> kDrop) & 1)) >> kDrop) -
                   (F::kRebias << F::kMantissa);
  V small = u - u;
  for (int i = 0; i < F::kBorders; ++i) small -= u > F::kBelow[i];
  const V sign = (bits >> 8) & 0x80;
  const V code = (u < F::kMinNormal ? small : normal) | sign;
  return magnitude > 0x7f80 ? magnitude - magnitude + 0x7f : code;
}

template <class F>
void cast(const bf16* x, uint8_t* out, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const Shorts bits = *reinterpret_cast<const LooseShorts*>(x + i);
    *reinterpret_cast<LooseBytes*>(out + i) =
        __builtin_convertvector(code_of<F>(bits), HalfBytes);
  }
  if (i == n) return;
  bf16 rest[kLanes] = {};
  __builtin_memcpy(rest, x + i, (n - i) * sizeof(bf16));
  const Shorts bits = *reinterpret_cast<const LooseShorts*>(rest);
  const HalfBytes codes = __builtin_convertvector(code_of<F>(bits), HalfBytes);
  __builtin_memcpy(out + i, &codes, n - i);
}

// Adding 2^k units rounds to the unit, which is that of the number's own exponent or, below the
// smallest normal number, that of the smallest; the processor rounds to nearest even.
template <class F>
inline uint8_t to_fp8(float x) {
  constexpr int kDrop = 23 - F::kMantissa, kMax = F::kMax << 16, kLeast = F::kMinNormal << 16;
  const int32_t bits = __builtin_bit_cast(int32_t, x), magnitude = bits & 0x7fffffff;
  const int32_t u = magnitude < kMax ? magnitude : kMax;
  const int32_t power = u & 0x7f800000;
  const int32_t exponent = power > kLeast ? power : kLeast;
  const int32_t shifter = exponent + (kDrop << 23);
  const int32_t sum = __builtin_bit_cast(
      int32_t, __builtin_bit_cast(float, u) + __builtin_bit_cast(float, shifter));
  const int32_t code = (sum - shifter) + ((exponent - kLeast) >> kDrop);
  const int32_t sign = (bits >> 24) & 0x80;
  return static_cast<uint8_t>(magnitude > 0x7f800000 ? 0x7f : code | sign);
}

template <class F>
void cast(const float* x, uint8_t* out, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = to_fp8<F>(x[i]);
}

// The pattern of float32, whose upper half is that of bf16: FP8 numbers fit in both.
template <class F>
inline int32_t from_fp8(uint8_t x) {
  constexpr int kShift = 23 - F::kMantissa;
  const int32_t code = x & 0x7f;
  const int32_t normal = (code << kShift) + (F::kRebias << 23);
  // As an integer times its unit: patterns of float32 subnormals might be flushed to zero.
  const int32_t small = __builtin_bit_cast(int32_t, static_cast<float>(code) * F::kUnit);
  int32_t bits = code < (1 << F::kMantissa) ? small : normal;
  if (F::kMantissa == 2) bits = code == 0x7c ? 0x7f800000 : bits;
  bits = code >= F::kFirstNan ? 0x7fc00000 : bits;
  return bits | static_cast<int32_t>(static_cast<uint32_t>(x & 0x80) << 24);
}

inline void put(float& out, int32_t bits) { out = __builtin_bit_cast(float, bits); }

inline void put(bf16& out, int32_t bits) {
  out.bits = static_cast<uint16_t>(static_cast<uint32_t>(bits) >> 16);
}

template <class F, class T>
void uncast(const uint8_t* x, T* out, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) put(out[i], from_fp8<F>(x[i]));
}

// 16 bytes; the compiler has shuffles for it on every processor with vectors.
typedef uint8_t Bytes __attribute__((vector_size(16), aligned(1), may_alias));

// 16 x 16 bytes. Four rounds of interleaving row i with row i + 8: each moves one bit of the row
// number into the column number.
inline void transpose16(const uint8_t* x, int64_t stride, uint8_t* out, int64_t out_stride) {
  Bytes a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = *reinterpret_cast<const Bytes*>(x + i * stride);
  for (int round = 0; round < 4; ++round) {
    for (int i = 0; i < 8; ++i) {
      b[2 * i] = __builtin_shufflevector(a[i], a[i + 8], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21,
                                         6, 22, 7, 23);
      b[2 * i + 1] = __builtin_shufflevector(a[i], a[i + 8], 8, 24, 9, 25, 10, 26, 11, 27, 12, 28,
                                             13, 29, 14, 30, 15, 31);
    }
    for (int i = 0; i < 16; ++i) a[i] = b[i];
  }
  for (int i = 0; i < 16; ++i) *reinterpret_cast<Bytes*>(out + i * out_stride) = a[i];
}

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Blocks of kRows x kColumns numbers are cast and turned in the caches.
//
// What a transposed copy costs is where its bytes go: neighbouring columns lie a row of the copy
// apart, on other pages, and with a power of two between them in the same few lines of the caches.
// So a column's part of kRows bytes is gathered first and then written at once, four whole lines
// of one page. Large results bypass the caches (`stream`): they would not stay there, and a line
// that is written whole need not be read first.
constexpr int64_t kRows = 256, kColumns = 256;
constexpr int64_t kLarge = 4 << 20;  // bytes of a result

// n bytes; `stream` as above.
inline void write(uint8_t* to, const uint8_t* from, int64_t n, bool stream) {
#ifdef __AVX2__
  if (stream && n % 64 == 0 && reinterpret_cast<uintptr_t>(to) % 64 == 0) {
    for (int64_t i = 0; i < n; i += 32)
      _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i),
                          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i)));
    return;
  }
#endif
  __builtin_memcpy(to, from, n);
}

// What was streamed is seen by other threads before what they are told next.
inline void finish(bool stream) {
#ifdef __AVX2__
  if (stream) _mm_sfence();
#endif
}

// Bytes x [rows, columns], at most kRows and kColumns, to out [columns, rows].
void transpose_block(const uint8_t* x, int64_t stride, uint8_t* out, int64_t out_stride,
                     int64_t rows, int64_t columns, bool stream) {
  alignas(64) uint8_t part[16 * kRows];
  const int64_t whole = rows / 16 * 16;
  for (int64_t c = 0; c < columns; c += 16) {
    const int64_t width = least(16, columns - c);
    if (width == 16)
      for (int64_t r = 0; r < whole; r += 16) transpose16(x + r * stride + c, stride, part + r, kRows);
    for (int64_t j = 0; j < width; ++j) {
      for (int64_t r = width == 16 ? whole : 0; r < rows; ++r)
        part[j * kRows + r] = x[r * stride + c + j];
      write(out + (c + j) * out_stride, part + j * kRows, rows, stream);
    }
  }
}

void transpose(const uint8_t* x, uint8_t* out, int64_t rows, int64_t columns, int64_t begin,
               int64_t end) {
  const bool stream = rows * columns >= kLarge;
  for (int64_t r = begin; r < end; r += kRows)
    for (int64_t c = 0; c < columns; c += kColumns)
      transpose_block(x + r * columns + c, columns, out + c * rows + r, rows, least(kRows, end - r),
                      least(kColumns, columns - c), stream);
  finish(stream);
}

// Asks for n numbers ahead of their use: the processor's own guesses end with a page.
template <class T>
inline void fetch(const T* x, int64_t n) {
  for (int64_t i = 0; i < n; i += 64 / int64_t{sizeof(T)}) __builtin_prefetch(x + i);
}

template <class F, class T>
void cast_transpose(const T* x, uint8_t* out, uint8_t* transposed, int64_t rows, int64_t columns,
                    int64_t begin, int64_t end) {
  constexpr int64_t kAhead = 8;  // rows
  alignas(64) uint8_t block[kRows * kColumns];
  const bool stream = rows * columns >= kLarge;
  for (int64_t r = begin; r < end; r += kRows) {
    const int64_t height = least(kRows, end - r);
    for (int64_t c = 0; c < columns; c += kColumns) {
      const int64_t width = least(kColumns, columns - c);
      for (int64_t i = 0; i < height; ++i) {
        const T* from = x + (r + i) * columns + c;
        if (i + kAhead < height)
          fetch(from + kAhead * columns, width);
        else if (height > kAhead && c + kColumns < columns)
          fetch(from + (kAhead - height) * columns + kColumns, least(width, columns - c - kColumns));
        cast<F>(from, block + i * kColumns, width);
        write(out + (r + i) * columns + c, block + i * kColumns, width, stream);
      }
      transpose_block(block, kColumns, transposed + c * rows + r, rows, height, width, stream);
    }
  }
  finish(stream);
}

template <class F, class T>
constexpr llmtrain::Fp8Casts<T> table() {
  return {cast<F>, uncast<F, T>, cast_transpose<F, T>};
}

extern const llmtrain::Fp8Kernels fp8;
const llmtrain::Fp8Kernels fp8 = {table<E4M3, float>(), table<E5M2, float>(), table<E4M3, bf16>(),
                                  table<E5M2, bf16>(), transpose};

}  // namespace KERNEL_SET
