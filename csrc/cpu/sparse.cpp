// Products with a sparse matrix, vectorised over tokens. Compiled once per instruction set with
// KERNEL_SET naming its namespace; arithmetic is float32 whatever the storage.
//
// x is turned into panels, [columns, tokens of a panel], so that a kept value meets consecutive
// tokens. What decides is how often a loaded vector is used: a band of 4 rows keeps 4 x 3 vectors
// of sums in registers, and a column of a tile takes 3 loads of x and 4 broadcasts for 12
// multiply-adds. Bands of fewer rows take more tokens instead, and are bound by the loads of x,
// which therefore have to come out of the first cache: hence the chunks of columns.
#include "sparse.h"

#include "number.h"
#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace KERNEL_SET {

using llmtrain::kTokens;
using llmtrain::SparseCopies;
using llmtrain::SparseGradient;
using llmtrain::SparseProduct;
using llmtrain::SparseSide;
using llmtrain::SparseUpdate;

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef float LooseVec __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

inline Vec load_vec(const float* x) { return *reinterpret_cast<const LooseVec*>(x); }
inline void store_vec(float* out, Vec x) { *reinterpret_cast<LooseVec*>(out) = x; }

inline Vec splat(const float* x) {
#if defined(__AVX512F__)
  return (Vec)_mm512_set1_ps(*x);
#elif defined(__AVX2__)
  return (Vec)_mm256_broadcast_ss(x);
#else
  return Vec{*x, *x, *x, *x};
#endif
}

// Holds a loaded vector in its register: the compiler would load it again for each use, and loads
// are what there are too few of.
inline void hold(Vec& x) {
#if defined(__AVX512F__)
  asm("" : "+v"(x));
#elif defined(__AVX2__)
  asm("" : "+x"(x));
#endif
}

// Vectors of sums a row: as many as registers allow, and enough to hide the latency of an add.
template <int H>
constexpr int kVectors = kLanes == 16 ? (H == 4 ? 4 : H == 2 ? 8 : 12)
                                      : (H == 4 ? 3 : H == 2 ? 6 : 10);

int64_t panel(int64_t height) {
  return kLanes * (height == 4 ? kVectors<4> : height == 2 ? kVectors<2> : kVectors<1>);
}

inline int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

// Bands [begin, end) of a chunk, for one panel: x of the chunk's first column, sums of row 0.
template <int H, int W>
void bands(const SparseSide& side, int64_t chunk, int64_t begin, int64_t end, const float* x,
           float* sums) {
  constexpr int V = kVectors<H>, P = V * kLanes;
  const int32_t* starts = side.starts + chunk * side.bands();
  for (int64_t band = begin; band < end; ++band) {
    float* out = sums + band * H * P;
    Vec sum[H][V];
#pragma GCC unroll 4
    for (int h = 0; h < H; ++h)
#pragma GCC unroll 12
      for (int v = 0; v < V; ++v)
        sum[h][v] = chunk == 0 ? Vec{} : load_vec(out + h * P + v * kLanes);
    const float* w = side.values + starts[band] * int64_t{H * W};
    for (int32_t tile = starts[band]; tile < starts[band + 1]; ++tile, w += H * W) {
      const float* in = x + side.columns_of[tile] * int64_t{P};
#pragma GCC unroll 4
      for (int j = 0; j < W; ++j) {
        Vec value[V];
        if (H > 1)
#pragma GCC unroll 12
          for (int v = 0; v < V; ++v) {
            value[v] = load_vec(in + j * P + v * kLanes);
            if (H == 4) hold(value[v]);
          }
#pragma GCC unroll 4
        for (int h = 0; h < H; ++h) {
          Vec factor = splat(w + j * H + h);
          hold(factor);
#pragma GCC unroll 12
          for (int v = 0; v < V; ++v)
            sum[h][v] += factor * (H > 1 ? value[v] : load_vec(in + j * P + v * kLanes));
        }
      }
    }
#pragma GCC unroll 4
    for (int h = 0; h < H; ++h)
#pragma GCC unroll 12
      for (int v = 0; v < V; ++v) store_vec(out + h * P + v * kLanes, sum[h][v]);
  }
}

using Bands = void (*)(const SparseSide&, int64_t, int64_t, int64_t, const float*, float*);

template <int H>
Bands bands_of(int64_t width) {
  return width == 4 ? bands<H, 4> : width == 2 ? bands<H, 2> : bands<H, 1>;
}

Bands bands_of(const SparseSide& side) {
  return side.height == 4   ? bands_of<4>(side.width)
         : side.height == 2 ? bands_of<2>(side.width)
                            : bands_of<1>(side.width);
}

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
  __m256 r[8], t[8];
  for (int i = 0; i < 8; ++i) r[i] = load8(x + i * stride);
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    store8(out + i * out_stride, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
    store8(out + (i + 4) * out_stride, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
  }
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

template <class T>
int64_t scratch(const SparseProduct<T>& job) {
  const SparseSide& side = job.side;
  return 16 + job.panels * panel(side.height) *
                  (round_up(side.columns, side.width) + side.bands() * side.height);
}

template <class T>
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
    turn_tokens(job.x + (first + p * width) * side.columns, at_most(count - p * width, width),
                side.columns, columns, width, x + p * columns * width);
  // Values of a segment stay in the second cache while the panels pass.
  constexpr int64_t kSegment = 1 << 15;
  const Bands run = bands_of(side);
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
    turn_block(sums + p * sums_of, width, side.rows, at_most(count - p * width, width),
               job.y + (first + p * width) * side.rows, side.rows);
}

template <class T>
void turn(const T* x, int64_t tokens, int64_t columns, int64_t multiple, float* out,
          int64_t index) {
  const int64_t padded = round_up(columns, multiple), first = index * kTokens;
  turn_tokens(x + first * columns, at_most(tokens - first, kTokens), columns, padded, kTokens,
              out + index * padded * kTokens);
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

// Three times four sums at once: `G` columns by `H` rows, over the tokens of a chunk.
template <int H>
void gradient_bands(const SparseGradient& job, int64_t chunk, int64_t begin, int64_t end,
                    int64_t block) {
  constexpr int G = 12 / H;
  const SparseSide& side = job.side;
  const int64_t columns_up = round_up(side.columns, side.width);
  const float* dy = job.dy + block * side.bands() * H * kTokens;
  const float* x = job.x + (block * columns_up + chunk * side.chunk) * kTokens;
  const int64_t tokens = round_up(at_most(kTokens, job.tokens - block * kTokens), kLanes);
  const int32_t* starts = side.starts + chunk * side.bands();
  const int shift = side.width == 4 ? 2 : side.width == 2 ? 1 : 0;  // a division is slow
  for (int64_t band = begin; band < end; ++band) {
    const float* rows = dy + band * H * kTokens;
    const int64_t first = starts[band] * side.width;
    const int64_t columns = starts[band + 1] * side.width - first;
    for (int64_t done = 0; done < columns; done += G) {
      const int64_t count = at_most(columns - done, G);
      const float* from[G];
      for (int g = 0; g < G; ++g) {
        // What is too much repeats the last column, and is not written.
        const int64_t c = first + done + at_most(g, count - 1);
        from[g] = x + (side.columns_of[c >> shift] + (c & (side.width - 1))) * kTokens;
      }
      Vec sum[G][H] = {};
      for (int64_t t = 0; t < tokens; t += kLanes) {
        Vec value[G];
        if (H == 4)
#pragma GCC unroll 3
          for (int g = 0; g < G; ++g) {
            value[g] = load_vec(from[g] + t);
            hold(value[g]);
          }
#pragma GCC unroll 4
        for (int h = 0; h < H; ++h) {
          Vec factor = load_vec(rows + h * kTokens + t);
          hold(factor);
#pragma GCC unroll 12
          for (int g = 0; g < G; ++g)
            sum[g][h] += factor * (H == 4 ? value[g] : load_vec(from[g] + t));
        }
      }
      float* out = job.out + (first + done) * H;
      const auto* quads = reinterpret_cast<const Vec*>(sum);
      for (int64_t q = 0; q < 3; ++q) {
        const int64_t left = at_most(count * H - 4 * q, 4);
        if (left > 0) add_sums(quads + 4 * q, out + 4 * q, left);
      }
    }
  }
}

void gradient(const SparseGradient& job, int64_t chunk, int64_t begin, int64_t end) {
  const SparseSide& side = job.side;
  const int32_t* starts = side.starts + chunk * side.bands();
  const int64_t size = side.height * side.width;
  for (int64_t i = starts[begin] * size; i < starts[end] * size; ++i) job.out[i] = 0.0f;
  const auto run = side.height == 4   ? gradient_bands<4>
                   : side.height == 2 ? gradient_bands<2>
                                      : gradient_bands<1>;
  for (int64_t block = 0; block * kTokens < job.tokens; ++block)
    run(job, chunk, begin, end, block);
}

// Calls fn(values of the tile, its place among the transposed, row, column) for a run's tiles.
template <class F>
void each_tile(const SparseCopies& job, int64_t run, const F& fn) {
  const SparseSide& side = job.side;
  const int64_t row = run % side.bands() * side.height, size = side.height * side.width;
  const int64_t column = run / side.bands() * side.chunk;
  for (int32_t tile = side.starts[run]; tile < side.starts[run + 1]; ++tile)
    fn(job.values + tile * size, job.turned + job.place[tile] * size, row,
       column + side.columns_of[tile]);
}

// The transposed copy of a tile, and the dense master weight where there is one.
inline void spread(const SparseSide& side, const float* tile, float* turned, float* weight,
                   int64_t row, int64_t column) {
  for (int64_t j = 0; j < side.width; ++j)
    for (int64_t h = 0; h < side.height; ++h)
      turned[h * side.width + j] = tile[j * side.height + h];
  if (weight == nullptr) return;
  for (int64_t h = 0; h < side.height && row + h < side.rows; ++h)
    for (int64_t j = 0; j < side.width && column + j < side.columns; ++j)
      weight[(row + h) * side.columns + column + j] = tile[j * side.height + h];
}

void repack(const SparseCopies& job, const float* weight, int64_t begin, int64_t end) {
  const SparseSide& side = job.side;
  for (int64_t run = begin; run < end; ++run)
    each_tile(job, run, [&](float* tile, float* turned, int64_t row, int64_t column) {
      for (int64_t j = 0; j < side.width; ++j)
        for (int64_t h = 0; h < side.height; ++h) {
          const bool inside = row + h < side.rows && column + j < side.columns;
          // Adding 0 turns -0 into 0.
          tile[j * side.height + h] =
              inside ? weight[(row + h) * side.columns + column + j] + 0.0f : 0.0f;
        }
      spread(side, tile, turned, nullptr, row, column);
    });
}

// Updates the values of the runs [begin, end), which lie side by side, then spreads each run.
template <class F>
void update(const SparseUpdate& job, int64_t begin, int64_t end, const F& fn) {
  const SparseSide& side = job.copies.side;
  const int64_t size = side.height * side.width;
  for (int64_t run = begin; run < end; ++run) {
    fn(side.starts[run] * size, side.starts[run + 1] * size);
    each_tile(job.copies, run, [&](float* tile, float* turned, int64_t row, int64_t column) {
      spread(side, tile, turned, job.weight, row, column);
    });
  }
}

void adamw(const SparseUpdate& job, int64_t begin, int64_t end) {
  float *p = job.copies.values, *m = job.first, *v = job.second;
  const float* g = job.grad;
  update(job, begin, end, [&](int64_t first, int64_t last) {
#pragma omp simd
    for (int64_t i = first; i < last; ++i) {
      m[i] += (1.0f - job.beta1) * (g[i] - m[i]);
      v[i] = job.beta2 * v[i] + (1.0f - job.beta2) * g[i] * g[i];
      const float denominator = __builtin_sqrtf(v[i]) * job.root + job.eps;
      p[i] = p[i] * job.decay - job.rate * m[i] / denominator + 0.0f;
    }
  });
}

void lion(const SparseUpdate& job, int64_t begin, int64_t end) {
  float *p = job.copies.values, *m = job.first;
  const float* g = job.grad;
  update(job, begin, end, [&](int64_t first, int64_t last) {
#pragma omp simd
    for (int64_t i = first; i < last; ++i) {
      const float c = m[i] + (1.0f - job.beta1) * (g[i] - m[i]);
      const float sign = c > 0.0f ? 1.0f : c < 0.0f ? -1.0f : c;  // NaN stays NaN
      p[i] = p[i] * job.decay - job.rate * sign + 0.0f;
      m[i] += (1.0f - job.beta2) * (g[i] - m[i]);
    }
  });
}

template <class T>
constexpr llmtrain::SparseKernels<T> table() {
  return {panel, scratch<T>, group<T>, turn<T>};
}

extern const llmtrain::SparseSet sparse;
const llmtrain::SparseSet sparse = {table<float>(), table<bf16>(), gradient, repack, adamw, lion};

}  // namespace KERNEL_SET
