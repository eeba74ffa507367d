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
// b + side, for each step of 32 along the sum, `next` words apart. The steps of a, whose rows are
// a_row apart, are `a_next` elements apart.
#ifdef __AMX_BF16__
inline void product(const bf16* a, int64_t a_row, const uint32_t* b, int64_t side, int64_t next,
                    int64_t steps, float* c, int64_t c_row, bool add, int64_t a_next = 32) {
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
  for (int64_t i = 0; i < steps; ++i, a += a_next, b += next) {
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
                      int64_t steps, float* c, int64_t c_row, bool add, int64_t a_next) {
  __m512 sum[16];
  for (int r = 0; r < 16; ++r)
    sum[r] = add ? _mm512_loadu_ps(c + r * c_row) : _mm512_setzero_ps();
  for (int64_t i = 0; i < steps; ++i, a += a_next, b += next) {
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
                    int64_t steps, float* c, int64_t c_row, bool add, int64_t a_next = 32) {
  for (int64_t half = 0; half < 32; half += 16) {
    const bf16* rows = a + half * a_row;
    float* sums = c + half * c_row;
    product16(rows, a_row, b, next, steps, sums, c_row, add, a_next);
    product16(rows, a_row, b + side, next, steps, sums + 16, c_row, add, a_next);
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

// Transposes 16 x 16 words held in 16 registers.
inline void transpose16(__m512i r[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

// Right operand whose sum runs along d: tile (n / 16, i / 32) of x [s, d], columns are rows of x.
inline void pack_columns(const bf16* x, int64_t s, int64_t d, uint32_t* out) {
  __m512i r[16];
  for (int64_t n = 0; n < s; n += 16)
    for (int64_t i = 0; i < d; i += 32, out += kTile) {
      for (int64_t k = 0; k < 16; ++k) r[k] = _mm512_loadu_si512(x + (n + k) * d + i);
      transpose16(r);
      for (int64_t k = 0; k < 16; ++k) _mm512_storeu_si512(out + 16 * k, r[k]);
    }
}

// Words of 16 columns of two rows of x, `row` apart.
inline __m512i pair(const bf16* x, int64_t row) {
  return interleave(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)),
                    _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + row)));
}

// 16 columns from `column` of two tokens, 0 where there are none.
inline __m512i load_pair(const bf16* x, int64_t n, int64_t width, int64_t token, int64_t column) {
  const int64_t left = width - column;
  const __mmask16 mask = left >= 16 ? 0xffff : left <= 0 ? 0 : (1u << left) - 1;
  const bf16* at = x + token * width + column;
  const __m256i low = _mm256_maskz_loadu_epi16(token < n ? mask : 0, at);
  const __m256i high = _mm256_maskz_loadu_epi16(token + 1 < n ? mask : 0, at + width);
  return interleave(low, high);
}

// Right operand whose sum runs along s: tile (n / 32, i / 16) of x [s, d], columns are columns.
inline void pack_rows(const bf16* x, int64_t s, int64_t d, uint32_t* out) {
  for (int64_t n = 0; n < s; n += 32)
    for (int64_t i = 0; i < d; i += 16)
      for (int64_t p = 0; p < 16; ++p, out += 16)
        _mm512_storeu_si512(out, pair(x + (n + 2 * p) * d + i, d));
}

}  // namespace KERNEL_SET
