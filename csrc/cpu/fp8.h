// Conversions to and from FP8, and the table through which an instruction set offers them.
#pragma once

#include <cstdint>

#include "rows.h"

namespace llmtrain {

// Conversions between T (float or bf16) and one FP8 format, as it lies in memory: a byte.
//
// To FP8: clipped to the largest finite number, then rounded to nearest even; infinities become
// that number, NaN stays NaN, the sign of zero is kept. Back: exact.
template <class T>
struct Fp8Casts {
  // n elements.
  void (*cast)(const T* x, uint8_t* out, int64_t n);
  void (*uncast)(const uint8_t* x, T* out, int64_t n);
  // x [rows, columns] -> out [rows, columns] and transposed [columns, rows], one read of x. Works
  // on the rows [begin, end); begin a multiple of kFp8Tile.
  void (*cast_transpose)(const T* x, uint8_t* out, uint8_t* transposed, int64_t rows,
                         int64_t columns, int64_t begin, int64_t end);
};

constexpr int64_t kFp8Tile = 64;

struct Fp8Kernels {
  Fp8Casts<float> e4m3_f32, e5m2_f32;
  Fp8Casts<bf16> e4m3_b16, e5m2_b16;
  // Bytes x [rows, columns] -> out [columns, rows]; rows [begin, end) of x, begin as above.
  void (*transpose)(const uint8_t* x, uint8_t* out, int64_t rows, int64_t columns, int64_t begin,
                    int64_t end);
};

}  // namespace llmtrain
