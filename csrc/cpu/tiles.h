// Products of 32 x 32 blocks of bfloat16 with float32 sums: AMX tiles or AVX512-BF16.
// Included once per instruction set, inside its namespace (KERNEL_SET).
//
// The right operand is packed: for 32 values along the sum and 16 columns, a tile of 16 x 16
// 32-bit words, word (p, n) holding the values 2p and 2p + 1 of column n.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "rows.h"

namespace KERNEL_SET {

using llmtrain::bf16;

constexpr int64_t kBlock = 32;
constexpr int64_t kTile = 256;  // words of a packed tile

// c [32, 32] (+)= a [32, 32 steps] times a packed right operand: two tiles side by side, b and
// b + side, for each step of 32 along the sum, `next` words apart.
#ifdef __AMX_BF16__
inline void product(const bf16* a, int64_t a_row, const uint32_t* b, int64_t side, int64_t next,
                    int64_t steps, float* c, int64_t c_row, bool add) {
  float* low = c + 16 * c_row;
  if (add) {
    _tile_loadd(0, c, c_row * 4);
    _tile_loadd(1, c + 16, c_row * 4);
    _tile_loadd(2, low, c_row * 4);
    _tile_loadd(3, low + 16, c_row * 4);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t i = 0; i < steps; ++i, a += 32, b += next) {
    _tile_loadd(4, a, a_row * 2);
    _tile_loadd(6, b, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, b + side, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, a + 16 * a_row, a_row * 2);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, c_row * 4);
  _tile_stored(1, c + 16, c_row * 4);
  _tile_stored(2, low, c_row * 4);
  _tile_stored(3, low + 16, c_row * 4);
}

// Eight tiles of 16 rows of 64 bytes while it lives. Restores the configuration it found: other
// libraries (oneDNN) keep theirs between calls.
class TileScope {
 public:
  TileScope() {
    _tile_storeconfig(before_);
    alignas(64) uint8_t config[64] = {1};
    for (int tile = 0; tile < 8; ++tile) {
      config[16 + 2 * tile] = 64;
      config[48 + tile] = 16;
    }
    _tile_loadconfig(config);
  }
  ~TileScope() {
    if (before_[0] == 0)
      _tile_release();
    else
      _tile_loadconfig(before_);
  }

 private:
  alignas(64) uint8_t before_[64];
};
#else
inline void product16(const bf16* a, int64_t a_row, const uint32_t* b, int64_t next,
                      int64_t steps, float* c, int64_t c_row, bool add) {
  __m512 sum[16];
  for (int r = 0; r < 16; ++r)
    sum[r] = add ? _mm512_loadu_ps(c + r * c_row) : _mm512_setzero_ps();
  for (int64_t i = 0; i < steps; ++i, a += 32, b += next) {
    for (int p = 0; p < 16; ++p) {
      const __m512bh right = (__m512bh)_mm512_loadu_si512(b + 16 * p);
#pragma GCC unroll 16
      for (int r = 0; r < 16; ++r) {
        int32_t pair;
        __builtin_memcpy(&pair, a + r * a_row + 2 * p, 4);
        sum[r] = _mm512_dpbf16_ps(sum[r], (__m512bh)_mm512_set1_epi32(pair), right);
      }
    }
  }
  for (int r = 0; r < 16; ++r) _mm512_storeu_ps(c + r * c_row, sum[r]);
}

inline void product(const bf16* a, int64_t a_row, const uint32_t* b, int64_t side, int64_t next,
                    int64_t steps, float* c, int64_t c_row, bool add) {
  for (int64_t half = 0; half < 32; half += 16) {
    product16(a + half * a_row, a_row, b, next, steps, c + half * c_row, c_row, add);
    product16(a + half * a_row, a_row, b + side, next, steps, c + half * c_row + 16, c_row, add);
  }
}

class TileScope {
 public:
  TileScope() {}
  ~TileScope() {}
};
#endif

// e^x for x <= 88; 0 for -inf. Relative error about 1e-7.
inline __m512 exp16(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-150.0f), x);  // in this order NaN stays NaN
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 8);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.3981999507e-3f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, n);
}

inline void store16(bf16* out, __m512 x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), (__m256i)_mm512_cvtneps_pbh(x));
}

inline __m512 load16(const bf16* x) {
  const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
}

// Words with the values of `low` in the low halves and those of `high` in the high halves.
inline __m512i interleave(__m256i low, __m256i high) {
  return _mm512_or_si512(_mm512_cvtepu16_epi32(low),
                         _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
}

// Right operand whose sum runs along d: tile (n / 16, i / 32) of x [s, d], columns are rows of x.
inline void pack_columns(const bf16* x, int64_t s, int64_t d, uint32_t* out) {
  const auto* words = reinterpret_cast<const uint32_t*>(x);
  const int64_t width = d / 2;
  const __m512i stride = _mm512_mullo_epi32(
      _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
      _mm512_set1_epi32(static_cast<int32_t>(width)));
  for (int64_t n = 0; n < s; n += 16)
    for (int64_t i = 0; i < width; ++i, out += 16)
      _mm512_storeu_si512(out, _mm512_i32gather_epi32(stride, words + n * width + i, 4));
}

// Right operand whose sum runs along s: tile (n / 32, i / 16) of x [s, d], columns are columns.
inline void pack_rows(const bf16* x, int64_t s, int64_t d, uint32_t* out) {
  for (int64_t n = 0; n < s; n += 32)
    for (int64_t i = 0; i < d; i += 16)
      for (int64_t p = 0; p < 16; ++p, out += 16) {
        const bf16* even = x + (n + 2 * p) * d + i;
        const auto* low = reinterpret_cast<const __m256i*>(even);
        const auto* high = reinterpret_cast<const __m256i*>(even + d);
        _mm512_storeu_si512(out, interleave(_mm256_loadu_si256(low), _mm256_loadu_si256(high)));
      }
}

}  // namespace KERNEL_SET
