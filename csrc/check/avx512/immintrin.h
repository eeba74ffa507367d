// AVX-512 and AMX intrinsics for a processor with AVX2, found before the compiler's own header by
// `make check-kernels` (tests/ops/check_avx512.py). SIMDe (github.com/simd-everywhere/simde) has
// most; what its release in Debian 12 lacks is written here, after Intel's manual.
#pragma once

#include_next <immintrin.h>

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>

#include <cstdint>

// Not inline functions of one linkage: units of several instruction sets meet in one library.
namespace {
namespace emulated {

typedef uint16_t Half16 __attribute__((vector_size(32), may_alias));
typedef uint32_t Word16 __attribute__((vector_size(64), may_alias));

inline __m512i widen(__m256i x) { return (__m512i)__builtin_convertvector((Half16)x, Word16); }

// bfloat16 products flush denormal numbers, whatever the processor's mode says.
inline float flushed(float x) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  return bits & 0x7f800000u ? x : __builtin_bit_cast(float, bits & 0x80000000u);
}

inline float wide(uint32_t bits) { return flushed(__builtin_bit_cast(float, bits)); }

// sum + the two products of a pair, the upper first, each rounded to nearest even.
inline float add_pair(float sum, uint32_t a, uint32_t b) {
  sum = flushed(__builtin_fmaf(wide(a & 0xffff0000u), wide(b & 0xffff0000u), flushed(sum)));
  return flushed(__builtin_fmaf(wide(a << 16), wide(b << 16), sum));
}

inline __m512 dot_pairs(__m512 sum, __m512bh a, __m512bh b) {
  const Word16 left = (Word16)a, right = (Word16)b;
  for (int i = 0; i < 16; ++i) sum[i] = add_pair(sum[i], left[i], right[i]);
  return sum;
}

// To nearest even; NaN keeps its upper bits and becomes quiet.
inline __m256bh narrow(__m512 x) {
  Half16 out;
  for (int i = 0; i < 16; ++i) {
    const uint32_t u = __builtin_bit_cast(uint32_t, flushed(x[i]));
    const bool nan = (u & 0x7fffffffu) > 0x7f800000u;
    out[i] = static_cast<uint16_t>(nan ? (u >> 16) | 0x40u
                                       : (u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
  }
  return (__m256bh)out;
}

inline float sum_of(__m512 x) {
  float half[8];
  for (int i = 0; i < 8; ++i) half[i] = x[i] + x[i + 8];
  for (int n = 4; n > 0; n /= 2)
    for (int i = 0; i < n; ++i) half[i] += half[i + n];
  return half[0];
}

inline float top_of(__m512 x) {
  float top = x[0];
  for (int i = 1; i < 16; ++i) top = x[i] > top ? x[i] : top;
  return top;
}

template <class T, class V>
inline V masked_load(uint32_t mask, const void* from) {
  constexpr int kCount = sizeof(V) / sizeof(T);
  T out[kCount] = {};
  for (int i = 0; i < kCount; ++i)
    if (mask >> i & 1) __builtin_memcpy(out + i, static_cast<const T*>(from) + i, sizeof(T));
  return __builtin_bit_cast(V, out);
}

template <class T, class V>
inline void masked_store(void* to, uint32_t mask, V x) {
  const auto* from = reinterpret_cast<const char*>(&x);
  for (size_t i = 0; i < sizeof(V) / sizeof(T); ++i)
    if (mask >> i & 1)
      __builtin_memcpy(static_cast<T*>(to) + i, from + i * sizeof(T), sizeof(T));
}

template <int K>
inline __m256 half_of(__m512 x) {
  __m256 out;
  for (int i = 0; i < 8; ++i) out[i] = x[8 * K + i];
  return out;
}

template <class F>
inline __mmask16 compare(__m512i a, __m512i b, const F& holds) {
  const Word16 x = (Word16)a, y = (Word16)b;
  __mmask16 mask = 0;
  for (int i = 0; i < 16; ++i)
    if (holds(static_cast<int32_t>(x[i]), static_cast<int32_t>(y[i])))
      mask |= static_cast<__mmask16>(1 << i);
  return mask;
}

// AMX: eight tiles of 16 rows of 64 bytes, usable while a configuration is loaded.
struct Tiles {
  uint32_t words[8][16][16];
  uint8_t config[64];
};
inline thread_local Tiles tiles = {};

inline void need_tiles() {
  if (tiles.config[0] != 1) __builtin_trap();
}

inline void load_config(const void* from) {
  __builtin_memcpy(tiles.config, from, 64);
  for (int tile = 0; tile < 8; ++tile)
    if (tiles.config[16 + 2 * tile] != 64 || tiles.config[48 + tile] != 16) __builtin_trap();
  __builtin_memset(tiles.words, 0, sizeof(tiles.words));
}

inline void store_config(void* to) { __builtin_memcpy(to, tiles.config, 64); }
inline void release() { __builtin_memset(&tiles, 0, sizeof(tiles)); }

inline void zero_tile(int tile) {
  need_tiles();
  __builtin_memset(tiles.words[tile], 0, 1024);
}

inline void load_tile(int tile, const void* from, int64_t stride) {
  need_tiles();
  for (int64_t r = 0; r < 16; ++r)
    __builtin_memcpy(tiles.words[tile][r], static_cast<const char*>(from) + r * stride, 64);
}

inline void store_tile(int tile, void* to, int64_t stride) {
  need_tiles();
  for (int64_t r = 0; r < 16; ++r)
    __builtin_memcpy(static_cast<char*>(to) + r * stride, tiles.words[tile][r], 64);
}

inline void dot_tiles(int c, int a, int b) {
  need_tiles();
  for (int m = 0; m < 16; ++m)
    for (int k = 0; k < 16; ++k)
      for (int n = 0; n < 16; ++n) {
        float sum = __builtin_bit_cast(float, tiles.words[c][m][n]);
        sum = add_pair(sum, tiles.words[a][m][k], tiles.words[b][k][n]);
        tiles.words[c][m][n] = __builtin_bit_cast(uint32_t, sum);
      }
}

}  // namespace emulated
}  // namespace

#undef _mm512_cvtepu16_epi32
#undef _mm512_dpbf16_ps
#undef _mm512_cvtneps_pbh
#undef _mm512_reduce_add_ps
#undef _mm512_reduce_max_ps
#undef _mm256_maskz_loadu_epi16
#undef _mm256_mask_storeu_epi16
#undef _mm512_maskz_loadu_epi16
#undef _mm512_maskz_loadu_epi32
#undef _mm512_maskz_loadu_ps
#undef _mm512_mask_storeu_ps
#undef _mm512_extractf32x8_ps
#undef _mm512_cmpge_epi32_mask
#undef _mm512_cmple_epi32_mask
#undef _mm512_cmplt_epi32_mask
#define _mm512_cvtepu16_epi32(x) emulated::widen(x)
#define _mm512_dpbf16_ps(sum, a, b) emulated::dot_pairs(sum, a, b)
#define _mm512_cvtneps_pbh(x) emulated::narrow(x)
#define _mm512_reduce_add_ps(x) emulated::sum_of(x)
#define _mm512_reduce_max_ps(x) emulated::top_of(x)
#define _mm256_maskz_loadu_epi16(mask, x) emulated::masked_load<uint16_t, __m256i>(mask, x)
#define _mm512_maskz_loadu_epi16(mask, x) emulated::masked_load<uint16_t, __m512i>(mask, x)
#define _mm512_maskz_loadu_epi32(mask, x) emulated::masked_load<uint32_t, __m512i>(mask, x)
#define _mm512_maskz_loadu_ps(mask, x) emulated::masked_load<float, __m512>(mask, x)
#define _mm512_mask_storeu_ps(out, mask, x) emulated::masked_store<float>(out, mask, x)
#define _mm256_mask_storeu_epi16(out, mask, x) emulated::masked_store<uint16_t>(out, mask, x)
#define _mm512_extractf32x8_ps(x, k) emulated::half_of<k>(x)
#define _mm512_cmpge_epi32_mask(a, b) \
  emulated::compare(a, b, [](int32_t x, int32_t y) { return x >= y; })
#define _mm512_cmple_epi32_mask(a, b) \
  emulated::compare(a, b, [](int32_t x, int32_t y) { return x <= y; })
#define _mm512_cmplt_epi32_mask(a, b) \
  emulated::compare(a, b, [](int32_t x, int32_t y) { return x < y; })

#define _tile_loadconfig(from) emulated::load_config(from)
#define _tile_storeconfig(to) emulated::store_config(to)
#define _tile_release() emulated::release()
#define _tile_zero(tile) emulated::zero_tile(tile)
#define _tile_loadd(tile, from, stride) emulated::load_tile(tile, from, stride)
#define _tile_stored(tile, to, stride) emulated::store_tile(tile, to, stride)
#define _tile_dpbf16ps(c, a, b) emulated::dot_tiles(c, a, b)

// What the sources ask for. Only here, after the headers that would believe it too. AMX is what a
// unit asks for by LLMTRAIN_EMULATED_AMX.
#define __AVX512F__ 1
#define __AVX512BW__ 1
#define __AVX512BF16__ 1
#ifdef LLMTRAIN_EMULATED_AMX
#define __AMX_BF16__ 1
#endif
