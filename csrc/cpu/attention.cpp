// Causal attention in bfloat16 with float32 scores, one key/value head at a time. Compiled once
// per instruction set (AMX, AVX512-BF16) with KERNEL_SET naming its namespace.
//
// Forward takes 32 queries at a time with all their keys, so the softmax is exact in one go.
// Backward takes 32 keys at a time with all their queries and works on transposed scores
// [keys, queries]: then every product finds its operands in order and nothing is transposed
// but dq at the end. Probabilities are recomputed from the log-sum-exp (FlashAttention-2, Dao
// 2023, algorithm 2, with one loop unrolled into a panel).
#include "attention.h"

#include "tiles.h"

namespace KERNEL_SET {

using llmtrain::AttentionShape;
using llmtrain::Matrix;

int64_t padded(int64_t s) { return (s + kBlock - 1) / kBlock * kBlock; }

// Hands out 64-byte aligned parts of the scratch memory.
class Scratch {
 public:
  explicit Scratch(float* memory) {
    const auto address = reinterpret_cast<uintptr_t>(memory);
    next_ = reinterpret_cast<float*>((address + 63) / 64 * 64);
  }
  float* floats(int64_t n) {
    float* part = next_;
    next_ += (n + 15) / 16 * 16;
    return part;
  }
  bf16* halves(int64_t n) { return reinterpret_cast<bf16*>(floats((n + 1) / 2)); }
  uint32_t* words(int64_t n) { return reinterpret_cast<uint32_t*>(floats(n)); }

 private:
  float* next_;
};

// x [s, d] as contiguous rows, zero rows up to a multiple of 32.
void gather_rows(Matrix x, int64_t head, int64_t s, int64_t d, bf16* out) {
  const bf16* from = x.data + head * x.head;
  for (int64_t i = 0; i < s; ++i) __builtin_memcpy(out + i * d, from + i * x.row, d * 2);
  __builtin_memset(out + s * d, 0, (padded(s) - s) * d * 2);
}

int64_t first_key(const AttentionShape& shape, int64_t query) {
  return shape.first == nullptr ? 0 : shape.first[query];
}

int64_t forward_scratch(int64_t s, int64_t d) {
  const int64_t n = padded(s);
  return 64 + n * d * 2 + kBlock * (n + n / 2 + d) + 256;
}

// Softmax of one row of scores over its visible keys [low, high), which lie in [begin, end).
// Writes unnormalised probabilities, 0 elsewhere; returns their sum and the maximum score.
float softmax_row(const float* score, bf16* p, int64_t begin, int64_t end, int64_t low,
                  int64_t high, float scale, float* top) {
  __m512 best = _mm512_set1_ps(-__builtin_inff());
  for (int64_t j = begin; j < end; j += 16) {
    const __m512i key = _mm512_add_epi32(
        _mm512_set1_epi32(static_cast<int32_t>(j)),
        _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
    const __mmask16 seen =
        _mm512_cmpge_epi32_mask(key, _mm512_set1_epi32(static_cast<int32_t>(low))) &
        _mm512_cmplt_epi32_mask(key, _mm512_set1_epi32(static_cast<int32_t>(high)));
    best = _mm512_mask_max_ps(best, seen, best, _mm512_loadu_ps(score + j - begin));
  }
  *top = _mm512_reduce_max_ps(best);
  const __m512 shift = _mm512_set1_ps(*top), factor = _mm512_set1_ps(scale);
  __m512 sum = _mm512_setzero_ps();
  for (int64_t j = begin; j < end; j += 16) {
    const __m512i key = _mm512_add_epi32(
        _mm512_set1_epi32(static_cast<int32_t>(j)),
        _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
    const __mmask16 seen =
        _mm512_cmpge_epi32_mask(key, _mm512_set1_epi32(static_cast<int32_t>(low))) &
        _mm512_cmplt_epi32_mask(key, _mm512_set1_epi32(static_cast<int32_t>(high)));
    const __m512 x = _mm512_sub_ps(_mm512_loadu_ps(score + j - begin), shift);
    const __m512 e = _mm512_maskz_mov_ps(seen, exp16(_mm512_mul_ps(x, factor)));
    sum = _mm512_add_ps(sum, e);
    store16(p + j - begin, e);
  }
  return _mm512_reduce_add_ps(sum);
}

void forward(const AttentionShape& shape, Matrix q, Matrix k, Matrix v, Matrix out, float* lse,
             float* scratch) {
  const TileScope tiles;
  const int64_t s = shape.s, d = shape.d, n = padded(s);
  Scratch memory(scratch);
  bf16* rows = memory.halves(n * d);
  uint32_t* keys = memory.words(n * d / 2);
  uint32_t* values = memory.words(n * d / 2);
  float* scores = memory.floats(kBlock * n);
  bf16* probs = memory.halves(kBlock * n);
  float* block = memory.floats(kBlock * d);
  gather_rows(k, 0, s, d, rows);
  pack_columns(rows, n, d, keys);
  gather_rows(v, 0, s, d, rows);
  pack_rows(rows, n, d, values);
  for (int64_t head = 0; head < shape.group; ++head) {
    gather_rows(q, head, s, d, rows);
    for (int64_t i0 = 0; i0 < s; i0 += kBlock) {
      const int64_t begin = first_key(shape, i0) / kBlock * kBlock, end = i0 + kBlock;
      const int64_t width = end - begin;
      for (int64_t j = begin; j < end; j += kBlock)
        product(rows + i0 * d, d, keys + j / 16 * (d / 32) * kTile, d / 32 * kTile, kTile, d / 32,
                scores + j - begin, width, false);
      float inverse[kBlock];
      for (int64_t i = 0; i < kBlock; ++i) {
        const int64_t query = i0 + i;
        const int64_t low = query < s ? first_key(shape, query) : 0;
        float top;
        const float sum = softmax_row(scores + i * width, probs + i * width, begin, end, low,
                                      query < s ? query + 1 : 0, shape.scale, &top);
        inverse[i] = 1.0f / sum;
        if (query < s) lse[head * s + query] = top * shape.scale + __builtin_logf(sum);
      }
      for (int64_t c = 0; c < d; c += kBlock)
        product(probs, width, values + (begin / 32 * (d / 16) + c / 16) * kTile, kTile,
                d / 16 * kTile, width / 32, block + c, d, false);
      for (int64_t i = 0; i < kBlock && i0 + i < s; ++i)
        for (int64_t c = 0; c < d; c += 16)
          store16(out.data + head * out.head + (i0 + i) * out.row + c,
                  _mm512_mul_ps(_mm512_loadu_ps(block + i * d + c), _mm512_set1_ps(inverse[i])));
    }
  }
}

int64_t backward_scratch(int64_t s, int64_t d) {
  const int64_t n = padded(s);
  return 64 + n * d / 2 * 8 + n * d * 3 + 3 * kBlock * n + 2 * kBlock * kBlock + 2 * n + 512;
}

// Everything backward keeps for one key/value head and the query head at hand.
struct Backward {
  bf16 *k_rows, *v_rows, *k_columns, *q_rows, *dout_rows;  // k_columns: [d, n]
  uint32_t *q_pack, *dout_pack, *q_pairs, *dout_pairs;     // packed along d, and along queries
  float *dk, *dv, *dq;                                     // [n, d], [n, d], [d, n]
  bf16 *p, *ds;                                            // [32 keys, queries]
  uint32_t* ds_pairs;                                      // packed along the keys
  float *score, *dp;                                       // [32 keys, 32 queries]
  float *lse, *delta;                                      // [n]
};

Backward carve(float* scratch, int64_t n, int64_t d) {
  Scratch m(scratch);
  Backward b;
  b.k_rows = m.halves(n * d);
  b.v_rows = m.halves(n * d);
  b.k_columns = m.halves(n * d);
  b.q_rows = m.halves(n * d);
  b.q_pack = m.words(n * d / 2);
  b.dout_pack = m.words(n * d / 2);
  b.q_pairs = m.words(n * d / 2);
  b.dout_pairs = m.words(n * d / 2);
  b.dk = m.floats(n * d);
  b.dv = m.floats(n * d);
  b.dq = m.floats(n * d);
  b.p = m.halves(kBlock * n);
  b.ds = m.halves(kBlock * n);
  b.ds_pairs = m.words(kBlock * n / 2);
  b.score = m.floats(kBlock * kBlock);
  b.dp = m.floats(kBlock * kBlock);
  b.lse = m.floats(n);
  b.delta = m.floats(n);
  b.dout_rows = b.q_rows;
  return b;
}

// p = exp(scale score - lse) and ds = scale p (dp - delta) for 32 keys from j0 and 32 queries
// from i0, whose panels start at query `start` and are `width` wide.
void probabilities(const Backward& b, const AttentionShape& shape, int64_t j0, int64_t i0,
                   int64_t start, int64_t width) {
  const __m512 scale = _mm512_set1_ps(shape.scale);
  const __m512i lane =
      _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (int64_t i = i0; i < i0 + kBlock; i += 16) {
    const __m512 lse = _mm512_loadu_ps(b.lse + i), delta = _mm512_loadu_ps(b.delta + i);
    const __m512i query = _mm512_add_epi32(_mm512_set1_epi32(static_cast<int32_t>(i)), lane);
    const __mmask16 real =
        _mm512_cmplt_epi32_mask(query, _mm512_set1_epi32(static_cast<int32_t>(shape.s)));
    const __m512i first = shape.first == nullptr
                              ? _mm512_setzero_si512()
                              : _mm512_maskz_loadu_epi32(real, shape.first + i);
    uint32_t* pairs = b.ds_pairs + (i - start) / 16 * kTile;
    for (int64_t j = 0; j < kBlock; j += 2) {
      __m256i rounded[2];
      for (int64_t odd = 0; odd < 2; ++odd) {
        const int64_t at = (j + odd) * kBlock + i - i0;
        const __m512i key = _mm512_set1_epi32(static_cast<int32_t>(j0 + j + odd));
        const __mmask16 seen = real & _mm512_cmpge_epi32_mask(query, key) &
                               _mm512_cmple_epi32_mask(first, key);
        const __m512 x = _mm512_fmsub_ps(_mm512_loadu_ps(b.score + at), scale, lse);
        const __m512 p = _mm512_maskz_mov_ps(seen, exp16(x));
        const __m512 slope = _mm512_sub_ps(_mm512_loadu_ps(b.dp + at), delta);
        const __m512 ds = _mm512_mul_ps(_mm512_mul_ps(p, scale), slope);
        store16(b.p + (j + odd) * width + i - start, p);
        rounded[odd] = (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_mov_ps(seen, ds));
        _mm256_storeu_si256(
            reinterpret_cast<__m256i*>(b.ds + (j + odd) * width + i - start), rounded[odd]);
      }
      _mm512_storeu_si512(pairs + j / 2 * 16, interleave(rounded[0], rounded[1]));
    }
  }
}

// The last query block that sees a key of the block at j0, exclusive.
int64_t last_query(const AttentionShape& shape, int64_t j0, int64_t n) {
  if (shape.first == nullptr) return n;
  int64_t end = shape.s;
  while (end > j0 && shape.first[end - 1] >= j0 + kBlock) --end;
  return padded(end);
}

// Adds to dk, dv and dq what one query head contributes.
void backward_head(const Backward& b, const AttentionShape& shape, int64_t n) {
  const int64_t d = shape.d, steps = d / 32;
  for (int64_t j0 = 0; j0 < n; j0 += kBlock) {
    const int64_t end = last_query(shape, j0, n), width = end - j0;
    for (int64_t i0 = j0; i0 < end; i0 += kBlock) {
      const int64_t tile = i0 / 16 * steps * kTile;
      product(b.k_rows + j0 * d, d, b.q_pack + tile, steps * kTile, kTile, steps, b.score, kBlock,
              false);
      product(b.v_rows + j0 * d, d, b.dout_pack + tile, steps * kTile, kTile, steps, b.dp, kBlock,
              false);
      probabilities(b, shape, j0, i0, j0, width);
      const uint32_t* pairs = b.ds_pairs + (i0 - j0) / 16 * kTile;
      for (int64_t c = 0; c < d; c += kBlock)
        product(b.k_columns + c * n + j0, n, pairs, kTile, 0, 1, b.dq + c * n + i0, n, true);
    }
    const int64_t row = j0 / 32 * (d / 16);
    for (int64_t c = 0; c < d; c += kBlock) {
      const int64_t tile = (row + c / 16) * kTile;
      product(b.p, width, b.dout_pairs + tile, kTile, d / 16 * kTile, width / 32,
              b.dv + j0 * d + c, d, true);
      product(b.ds, width, b.q_pairs + tile, kTile, d / 16 * kTile, width / 32,
              b.dk + j0 * d + c, d, true);
    }
  }
}

void store_rows(const float* x, int64_t s, int64_t d, Matrix out) {
  for (int64_t i = 0; i < s; ++i)
    for (int64_t c = 0; c < d; c += 16)
      store16(out.data + i * out.row + c, _mm512_loadu_ps(x + i * d + c));
}

// out [s, d] = x^T for x [d, n], 16 x 16 at a time.
void store_columns(const float* x, int64_t n, int64_t s, int64_t d, bf16* out, int64_t row) {
  __m512i r[16];
  for (int64_t c = 0; c < d; c += 16)
    for (int64_t i = 0; i < s; i += 16) {
      for (int64_t k = 0; k < 16; ++k) r[k] = _mm512_loadu_si512(x + (c + k) * n + i);
      transpose16(r);
      for (int64_t k = 0; k < 16 && i + k < s; ++k)
        store16(out + (i + k) * row + c, _mm512_castsi512_ps(r[k]));
    }
}

// out [d, n] = x^T for x [n, d]: words of two rows are transposed, n and d multiples of 32.
void transpose_rows(const bf16* x, int64_t n, int64_t d, bf16* out) {
  __m512i r[16];
  for (int64_t i = 0; i < n; i += 32)
    for (int64_t c = 0; c < d; c += 16) {
      for (int64_t p = 0; p < 16; ++p) r[p] = pair(x + (i + 2 * p) * d + c, d);
      transpose16(r);
      for (int64_t k = 0; k < 16; ++k) _mm512_storeu_si512(out + (c + k) * n + i, r[k]);
    }
}

void backward(const AttentionShape& shape, Matrix q, Matrix k, Matrix v, Matrix out,
              const float* lse, Matrix dout, Matrix dq, Matrix dk, Matrix dv, float* scratch) {
  const TileScope tiles;
  const int64_t s = shape.s, d = shape.d, n = padded(s);
  const Backward b = carve(scratch, n, d);
  gather_rows(k, 0, s, d, b.k_rows);
  gather_rows(v, 0, s, d, b.v_rows);
  transpose_rows(b.k_rows, n, d, b.k_columns);
  __builtin_memset(b.dk, 0, n * d * 4);
  __builtin_memset(b.dv, 0, n * d * 4);
  for (int64_t head = 0; head < shape.group; ++head) {
    gather_rows(dout, head, s, d, b.dout_rows);
    pack_columns(b.dout_rows, n, d, b.dout_pack);
    pack_rows(b.dout_rows, n, d, b.dout_pairs);
    for (int64_t i = 0; i < n; ++i) {
      __m512 sum = _mm512_setzero_ps();
      for (int64_t c = 0; i < s && c < d; c += 16)
        sum = _mm512_fmadd_ps(load16(b.dout_rows + i * d + c),
                              load16(out.data + head * out.head + i * out.row + c), sum);
      b.delta[i] = _mm512_reduce_add_ps(sum);
      b.lse[i] = i < s ? lse[head * s + i] : 0.0f;
    }
    gather_rows(q, head, s, d, b.q_rows);
    pack_columns(b.q_rows, n, d, b.q_pack);
    pack_rows(b.q_rows, n, d, b.q_pairs);
    __builtin_memset(b.dq, 0, n * d * 4);
    backward_head(b, shape, n);
    store_columns(b.dq, n, s, d, dq.data + head * dq.head, dq.row);
  }
  store_rows(b.dk, s, d, dk);
  store_rows(b.dv, s, d, dv);
}

extern const llmtrain::AttentionKernels attention;
const llmtrain::AttentionKernels attention = {forward_scratch, backward_scratch, forward,
                                              backward};

}  // namespace KERNEL_SET
