// Products with a sparse matrix in bfloat16 with float32 sums, for AVX512-BF16 (vdpbf16ps).
// Compiled with KERNEL_SET naming its namespace.
//
// The product multiplies pairs of bfloat16 that lie side by side in a 32-bit word and adds both to
// one float32 sum. In y = x W^T a pair is two neighbouring columns, so panels have half as many
// rows, and weights are rounded to bfloat16 and packed two by two; tiles one column wide meet in a
// pair where their columns do, else its other half is 0. In the gradient a pair is two tokens.
// Denormal numbers count as 0: the instruction flushes them.
#include "sparse.h"

#include "sparse_product.h"
#include "tiles.h"

namespace KERNEL_SET {

using llmtrain::SparseWords;

struct Pairs {
  using Token = bf16;
  static constexpr int kStep = 2 * kLanes;
  static constexpr bool kWritten = false;
  static Vec tokens(const bf16* x) { return (Vec)_mm512_loadu_si512(x); }
  static Vec tokens_again(const bf16* x) { return tokens(x); }
  static void multiply_add(Vec& sum, const Vec& a, const Vec& b) {
    sum = (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }

  // `count` tokens of x [.., columns] -> words [padded, width] of two columns each.
  static void turn_in(const bf16* x, int64_t count, int64_t columns, int64_t padded,
                      int64_t width, float* out) {
    __m512i r[16];
    for (int64_t c = 0; c < padded; c += 16) {
      const int64_t last = at_most(16, padded - c), left = columns - 2 * c;
      const __mmask32 mask = left >= 32 ? ~0u : left <= 0 ? 0u : (1u << left) - 1;
      for (int64_t t = 0; t < width; t += 16) {
        for (int64_t k = 0; k < 16; ++k)
          r[k] = _mm512_maskz_loadu_epi16(t + k < count ? mask : 0u, x + (t + k) * columns + 2 * c);
        transpose16(r);
        for (int64_t k = 0; k < last; ++k) _mm512_storeu_si512(out + (c + k) * width + t, r[k]);
      }
    }
  }

  // Sums [rows, width] of `count` tokens -> y [count, rows].
  static void turn_out(const float* sums, int64_t width, int64_t rows, int64_t count, bf16* y) {
    __m512i r[16];
    for (int64_t t = 0; t < count; t += 16)
      for (int64_t n = 0; n < rows; n += 16) {
        const int64_t left = rows - n;
        const __mmask16 mask = left >= 16 ? 0xffff : (1u << left) - 1;
        for (int64_t k = 0; k < 16; ++k)
          r[k] = k < left ? _mm512_loadu_si512(sums + (n + k) * width + t) : _mm512_setzero_si512();
        transpose16(r);
        for (int64_t k = 0; k < 16 && t + k < count; ++k)
          _mm256_mask_storeu_epi16(y + (t + k) * rows + n, mask,
                                   (__m256i)_mm512_cvtneps_pbh(_mm512_castsi512_ps(r[k])));
      }
  }
};

// x [tokens, columns] -> chunk `index` of [chunks, columns rounded up to `multiple`, kTokens].
void turn(const bf16* x, int64_t tokens, int64_t columns, int64_t multiple, bf16* out,
          int64_t index) {
  const int64_t padded = round_up(columns, multiple), first = index * kTokens;
  const bf16* from = x + first * columns;
  const int64_t count = at_most(tokens - first, kTokens);
  bf16* to = out + index * padded * kTokens;
  __m512i r[16];
  for (int64_t c = 0; c < padded; c += 16)
    for (int64_t t = 0; t < kTokens; t += 32) {
      for (int64_t p = 0; p < 16; ++p) r[p] = load_pair(from, count, columns, t + 2 * p, c);
      transpose16(r);
      for (int64_t k = 0; k < at_most(16, padded - c); ++k)
        _mm512_storeu_si512(to + (c + k) * kTokens + t, r[k]);
    }
}

// Calls fn(column of the pair, first tile or -1, second tile or -1) for a run of narrow tiles.
template <class F>
inline void each_pair(const SparseSide& side, int64_t run, const F& fn) {
  for (int32_t tile = side.starts[run]; tile < side.starts[run + 1];) {
    const int32_t column = side.columns_of[tile], next = tile + 1;
    const bool odd = column & 1;
    const bool both = !odd && next < side.starts[run + 1] && side.columns_of[next] == column + 1;
    fn(column >> 1, odd ? -1 : tile, odd ? tile : both ? next : -1);
    tile = next + both;
  }
}

void count(const SparseSide& side, int32_t* counts, int64_t begin, int64_t end) {
  for (int64_t run = begin; run < end; ++run) {
    int32_t pairs = 0;
    each_pair(side, run, [&](int32_t, int32_t, int32_t) { ++pairs; });
    counts[run] = pairs;
  }
}

inline uint32_t word(float low, float high) {
  bf16 a, b;
  store(a, low);
  store(b, high);
  return a.bits | static_cast<uint32_t>(b.bits) << 16;
}

void pack(const SparseSide& side, const SparseWords& out, int64_t begin, int64_t end) {
  const int64_t height = side.height, size = height * side.width;
  for (int64_t run = begin; run < end; ++run) {
    if (side.width == 1) {
      int64_t at = out.starts[run];
      each_pair(side, run, [&](int32_t column, int32_t first, int32_t second) {
        for (int64_t h = 0; h < height; ++h)
          out.words[at * height + h] =
              word(first < 0 ? 0.0f : side.values[first * height + h],
                   second < 0 ? 0.0f : side.values[second * height + h]);
        out.columns_of[at++] = column;
      });
      continue;
    }
    for (int32_t tile = side.starts[run]; tile < side.starts[run + 1]; ++tile)
      out.columns_of[tile] = side.columns_of[tile] >> 1;
    // Two columns of `height` values each, then the next two.
    for (int64_t i = side.starts[run] * size; i < side.starts[run + 1] * size; i += 2 * height)
      for (int64_t h = 0; h < height; ++h)
        out.words[i / 2 + h] = word(side.values[i + h], side.values[i + height + h]);
  }
}

extern const llmtrain::SparsePairs sparse_pairs;
const llmtrain::SparsePairs sparse_pairs = {count, pack, panel, scratch<bf16>, group<Pairs, bf16>,
                                            turn,  gradient<Pairs>};

}  // namespace KERNEL_SET
