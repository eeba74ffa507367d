// y = x W^T with a sparse W, and the gradient of W's values, for any arithmetic A.
// Included once per instruction set, inside its namespace (KERNEL_SET).
//
// x is turned into panels, [columns, tokens of a panel], so that a kept value meets consecutive
// tokens. What decides is how often a loaded vector is used: a band of 4 rows keeps 4 x 3 vectors
// of sums in registers, and a column of a tile takes 3 loads of x and 4 broadcasts for 12
// multiply-adds. Bands of fewer rows take more tokens instead, and are bound by the loads of x,
// which therefore have to come out of the first cache: hence the chunks of columns.
//
// A names what one element of a panel is (a float, or two bfloat16 of neighbouring columns), how it
// is multiplied, and how x and y are turned.
#pragma once

#include "sparse_turn.h"

namespace KERNEL_SET {

using llmtrain::SparseGradient;
using llmtrain::SparseProduct;
using llmtrain::SparseSide;

// Vectors of sums a row: as many as registers allow, and enough to hide the latency of an add.
template <int H>
constexpr int kVectors = kLanes == 16 && H > 1 ? 16 / H : 12 / H;

inline int64_t panel(int64_t height) {
  return kLanes * (height == 4 ? kVectors<4> : height == 2 ? kVectors<2> : kVectors<1>);
}

// sum [H, V] += w [H] times x [V]. What there are fewer of is loaded first, and held.
template <class A, int H>
inline void add_column(const float* w, const float* x, Vec* sum) {
  constexpr int V = kVectors<H>;
  if constexpr (A::kWritten && H == 4) {
    A::add_column4(w, x, sum);
  } else if (H == 4) {
    Vec value[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) value[v] = load_once(x + v * kLanes);
#pragma GCC unroll 4
    for (int h = 0; h < H; ++h) {
      const Vec factor = splat(w + h);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) A::multiply_add(sum[h * V + v], factor, value[v]);
    }
  } else {
    Vec factor[H];
#pragma GCC unroll 2
    for (int h = 0; h < H; ++h) factor[h] = splat(w + h);
#pragma GCC unroll 12
    for (int v = 0; v < V; ++v) {
      const Vec value = H > 1 ? load_once(x + v * kLanes) : load_vec(x + v * kLanes);
#pragma GCC unroll 2
      for (int h = 0; h < H; ++h) A::multiply_add(sum[h * V + v], factor[h], value);
    }
  }
}

// Bands [begin, end) of a chunk, for one panel: x of the chunk's first column, sums of row 0.
template <class A, int H, int W>
void bands(const SparseSide& side, int64_t chunk, int64_t begin, int64_t end, const float* x,
           float* sums) {
  constexpr int V = kVectors<H>, P = V * kLanes;
  const int32_t *starts = side.starts + chunk * side.bands(), *columns_of = side.columns_of;
  for (int64_t band = begin; band < end; ++band) {
    float* out = sums + band * H * P;
    Vec sum[H * V];
#pragma GCC unroll 16
    for (int i = 0; i < H * V; ++i)
      sum[i] = chunk == 0 ? zero() : load_vec(out + i * kLanes);
    const float* w = side.values + starts[band] * int64_t{H * W};
    const int32_t* end_of = columns_of + starts[band + 1];
    for (const int32_t* tile = columns_of + starts[band]; tile < end_of; ++tile, w += H * W) {
      const float* in = x + *tile * int64_t{P};
#pragma GCC unroll 4
      for (int j = 0; j < W; ++j) add_column<A, H>(w + j * H, in + j * P, sum);
    }
#pragma GCC unroll 16
    for (int i = 0; i < H * V; ++i) store_vec(out + i * kLanes, sum[i]);
  }
}

using Bands = void (*)(const SparseSide&, int64_t, int64_t, int64_t, const float*, float*);

template <class A, int H>
Bands bands_of(int64_t width) {
  return width == 4 ? bands<A, H, 4> : width == 2 ? bands<A, H, 2> : bands<A, H, 1>;
}

template <class A>
Bands bands_of(const SparseSide& side) {
  return side.height == 4   ? bands_of<A, 4>(side.width)
         : side.height == 2 ? bands_of<A, 2>(side.width)
                            : bands_of<A, 1>(side.width);
}

template <class T>
int64_t scratch(const SparseProduct<T>& job) {
  const SparseSide& side = job.side;
  return 16 + job.panels * panel(side.height) *
                  (round_up(side.columns, side.width) + side.bands() * side.height);
}

template <class A, class T>
void group(const SparseProduct<T>& job, int64_t index, float* memory) {
  const SparseSide& side = job.side;
  const int64_t width = panel(side.height), columns = round_up(side.columns, side.width);
  const int64_t first = index * job.panels * width;
  const int64_t count = at_most(job.tokens - first, job.panels * width);
  const int64_t panels = (count + width - 1) / width, bands = side.bands();
  const auto address = (reinterpret_cast<uintptr_t>(memory) + 63) / 64 * 64;
  auto* x = reinterpret_cast<float*>(address);
  float* sums = x + panels * columns * width;
  const int64_t sums_of = bands * side.height * width;
  for (int64_t p = 0; p < panels; ++p)
    A::turn_in(job.x + (first + p * width) * job.columns, at_most(count - p * width, width),
               job.columns, columns, width, x + p * columns * width);
  // Values of a segment stay in the second cache while the panels pass.
  constexpr int64_t kSegment = 1 << 15;
  const Bands run = bands_of<A>(side);
  for (int64_t chunk = 0; chunk < side.chunks(); ++chunk) {
    const int32_t* starts = side.starts + chunk * bands;
    for (int64_t begin = 0, end; begin < bands; begin = end) {
      const int64_t most = starts[begin] + kSegment / (side.height * side.width);
      for (end = begin + 1; end < bands && starts[end + 1] <= most;) ++end;
      for (int64_t p = 0; p < panels; ++p)
        run(side, chunk, begin, end, x + (p * columns + chunk * side.chunk) * width,
            sums + p * sums_of);
    }
  }
  for (int64_t p = 0; p < panels; ++p)
    A::turn_out(sums + p * sums_of, width, side.rows, at_most(count - p * width, width),
                job.y + (first + p * width) * side.rows);
}

// Sums of four vectors, added to `out`: the first `count` of them.
inline void add_sums(const Vec* quad, float* out, int64_t count) {
  float sums[4];
#if defined(__AVX2__)
#ifdef __AVX512F__
  __m256 q[4];
  for (int i = 0; i < 4; ++i) {
    const __m512 whole = (__m512)quad[i];
    q[i] = _mm256_add_ps(_mm512_castps512_ps256(whole), _mm512_extractf32x8_ps(whole, 1));
  }
#else
  const auto* q = reinterpret_cast<const __m256*>(quad);
#endif
  const __m256 pairs =
      _mm256_hadd_ps(_mm256_hadd_ps(q[0], q[1]), _mm256_hadd_ps(q[2], q[3]));
  const __m128 four =
      _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1));
  if (count == 4) {
    _mm_storeu_ps(out, _mm_add_ps(_mm_loadu_ps(out), four));
    return;
  }
  _mm_storeu_ps(sums, four);
#else
  for (int i = 0; i < 4; ++i) {
    sums[i] = 0.0f;
    for (int l = 0; l < kLanes; ++l) sums[i] += quad[i][l];
  }
#endif
  for (int64_t i = 0; i < count; ++i) out[i] += sums[i];
}

// Columns of x whose sums are in registers together, and vectors of tokens that each keeps apart.
// Single rows take fewer columns: twelve pointers do not fit into the registers.
template <int H>
constexpr int kColumns = H == 1 ? 4 : 12 / H;
template <int H>
constexpr int kApart = H == 1 ? 3 : 1;

// sum += tokens from t of H rows of dy times those of columns of x: [kColumns, H], thrice for H 1.
template <class A, int H>
inline void add_tokens(const typename A::Token* dy, const typename A::Token* const* x, int64_t t,
                       Vec* sum) {
  constexpr int G = kColumns<H>;
  if constexpr (A::kWritten && H == 4) {
    A::add_tokens4(dy + t, x[0] + t, x[1] + t, x[2] + t, sum);
  } else if (H == 4) {
    Vec value[G];
#pragma GCC unroll 3
    for (int g = 0; g < G; ++g) value[g] = A::tokens(x[g] + t);
#pragma GCC unroll 4
    for (int h = 0; h < H; ++h) {
      const Vec factor = A::tokens(dy + h * kTokens + t);
#pragma GCC unroll 3
      for (int g = 0; g < G; ++g) A::multiply_add(sum[g * H + h], factor, value[g]);
    }
  } else if (H == 2) {
    Vec factor[H];
#pragma GCC unroll 2
    for (int h = 0; h < H; ++h) factor[h] = A::tokens(dy + h * kTokens + t);
#pragma GCC unroll 6
    for (int g = 0; g < G; ++g) {
      const Vec value = A::tokens(x[g] + t);
#pragma GCC unroll 2
      for (int h = 0; h < H; ++h) A::multiply_add(sum[g * H + h], factor[h], value);
    }
  } else {
#pragma GCC unroll 3
    for (int u = 0; u < kApart<H>; ++u) {
      const Vec factor = A::tokens(dy + t + u * A::kStep);
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g)
        A::multiply_add(sum[u * G + g], factor, A::tokens_again(x[g] + t + u * A::kStep));
    }
  }
}

// The sums of tokens chunk `block`, for the bands [begin, end) of a chunk.
template <class A, int H>
void gradient_bands(const SparseGradient<typename A::Token>& job, int64_t chunk, int64_t begin,
                    int64_t end, int64_t block) {
  constexpr int G = kColumns<H>, kStep = kApart<H> * A::kStep;
  static_assert(kTokens % kStep == 0);
  const SparseSide& side = job.side;
  const int64_t columns_up = round_up(side.columns, side.width);
  const auto* dy = job.dy + block * side.bands() * H * kTokens;
  const auto* x = job.x + (block * columns_up + chunk * side.chunk) * kTokens;
  const int64_t tokens = round_up(at_most(kTokens, job.tokens - block * kTokens), kStep);
  const int32_t* starts = side.starts + chunk * side.bands();
  const int shift = side.width == 4 ? 2 : side.width == 2 ? 1 : 0;  // a division is slow
  for (int64_t band = begin; band < end; ++band) {
    const auto* rows = dy + band * H * kTokens;
    const int64_t first = starts[band] * side.width;
    const int64_t columns = starts[band + 1] * side.width - first;
    for (int64_t done = 0; done < columns; done += G) {
      const int64_t count = at_most(columns - done, G);
      const typename A::Token* from[G];
      for (int g = 0; g < G; ++g) {
        // What is too much repeats the last column, and is not written.
        const int64_t c = first + done + at_most(g, count - 1);
        from[g] = x + (side.columns_of[c >> shift] + (c & (side.width - 1))) * kTokens;
      }
      Vec sum[12] = {};
      for (int64_t t = 0; t < tokens; t += kStep) add_tokens<A, H>(rows, from, t, sum);
      float* out = job.out + (first + done) * H;
      // A copy, because what has an address is stored in every turn of the loop.
      Vec sums[12];
#pragma GCC unroll 12
      for (int i = 0; i < 12; ++i) sums[i] = sum[i];
      if (H == 1)
        for (int g = 0; g < G; ++g) sums[g] += sums[G + g] + sums[2 * G + g];
      for (int64_t q = 0; q < G * H / 4; ++q) {
        const int64_t left = at_most(count * H - 4 * q, 4);
        if (left > 0) add_sums(sums + 4 * q, out + 4 * q, left);
      }
    }
  }
}

template <class A>
void gradient(const SparseGradient<typename A::Token>& job, int64_t chunk, int64_t begin,
              int64_t end) {
  const SparseSide& side = job.side;
  const int32_t* starts = side.starts + chunk * side.bands();
  const int64_t size = side.height * side.width;
  for (int64_t i = starts[begin] * size; i < starts[end] * size; ++i) job.out[i] = 0.0f;
  const auto run = side.height == 4   ? gradient_bands<A, 4>
                   : side.height == 2 ? gradient_bands<A, 2>
                                      : gradient_bands<A, 1>;
  for (int64_t block = 0; block * kTokens < job.tokens; ++block)
    run(job, chunk, begin, end, block);
}

}  // namespace KERNEL_SET
