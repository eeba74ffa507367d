// Numbers of the row kernels: bfloat16, and an exponential that the compiler can vectorise.
// Included once per instruction set, inside its namespace (KERNEL_SET).
#pragma once

#include <cstdint>

#include "rows.h"

namespace KERNEL_SET {

using llmtrain::bf16;

inline float load(float x) { return x; }

inline float load(bf16 x) {
  return __builtin_bit_cast(float, static_cast<uint32_t>(x.bits) << 16);
}

inline void store(float& out, float x) { out = x; }

// Rounds to nearest even, as torch does.
inline void store(bf16& out, float x) {
  const uint32_t u = __builtin_bit_cast(uint32_t, x);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  out.bits = static_cast<uint16_t>(x != x ? 0x7fc0u : rounded);
}

// e^x within 2 ulp for x in [-87.3, 88.7], clamped outside; NaN stays NaN.
// 2^n e^r with n = round(x / ln 2), |r| <= ln(2) / 2 and a polynomial of degree 6 (Cephes).
inline float exponential(float x) {
  x = x < -87.3f ? -87.3f : x;
  x = x > 88.7f ? 88.7f : x;
  const float shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: rounds to an integer
  const float n = shifted - 12582912.0f;
  float r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  // n is in the low bits of `shifted`; adding it to the exponent multiplies by 2^n.
  const uint32_t power = __builtin_bit_cast(uint32_t, shifted) << 23;
  return __builtin_bit_cast(float, __builtin_bit_cast(uint32_t, p) + power);
}

// 1 / x for x in [1, 1e36] within 1 ulp or so: three Newton steps, about half the cost of a
// vector division.
inline float reciprocal(float x) {
  float y = __builtin_bit_cast(float, 0x7ef311c7u - __builtin_bit_cast(uint32_t, x));
  y = y * (2.0f - x * y);
  y = y * (2.0f - x * y);
  return y * (2.0f - x * y);
}

// sigmoid(x) and 1 - sigmoid(x), each to its own last digits; 0 beyond -80 and 80, so that products
// with a huge x vanish.
struct Logistic {
  float value, rest;
};

inline Logistic logistic(float x) {
  const float bounded = x < -80.0f ? -80.0f : x;
  const float e = exponential(-bounded), r = reciprocal(1.0f + e);
  return {x < -80.0f ? 0.0f : r, x > 80.0f ? 0.0f : e * r};
}

}  // namespace KERNEL_SET
