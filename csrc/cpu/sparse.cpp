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

// Loads that stay where they stand: the compiler would load a vector again for each use, and loads
// are what there are too few of, or begin the next column early and run out of registers.
inline Vec splat(const float* x) {
  Vec out;
#if defined(__AVX512F__)
  asm volatile("vbroadcastss %1, %0" : "=v"(out) : "m"(*x));
#elif defined(__AVX2__)
  asm volatile("vbroadcastss %1, %0" : "=x"(out) : "m"(*x));
#else
  out = Vec{*x, *x, *x, *x};
#endif
  return out;
}

// A zero for one use: the compiler would keep it in a register of its own through the loops.
inline Vec zero() {
  Vec out;
#if defined(__AVX512F__)
  asm volatile("vpxord %0, %0, %0" : "=v"(out));
#elif defined(__AVX2__)
  asm volatile("vxorps %0, %0, %0" : "=x"(out));
#else
  out = Vec{};
#endif
  return out;
}

inline Vec load_once(const float* x) {
  Vec out;
#if defined(__AVX512F__)
  asm volatile("vmovups %1, %0" : "=v"(out) : "m"(*reinterpret_cast<const LooseVec*>(x)));
#elif defined(__AVX2__)
  asm volatile("vmovups %1, %0" : "=x"(out) : "m"(*reinterpret_cast<const LooseVec*>(x)));
#else
  out = load_vec(x);
#endif
  return out;
}

// sum += a * b, with the sum staying where it is: left to choose, the compiler keeps it in the
// register of a factor, and then moves and spills.
inline void multiply_add(Vec& sum, const Vec& a, const Vec& b) {
#if defined(__AVX512F__)
  asm volatile("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(a), "vm"(b));
#elif defined(__AVX2__)
  asm volatile("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(a), "xm"(b));
#else
  sum += a * b;
#endif
}

// Vectors of sums a row: as many as registers allow, and enough to hide the latency of an add.
template <int H>
constexpr int kVectors = kLanes == 16 && H > 1 ? 16 / H : 12 / H;

int64_t panel(int64_t height) {
  return kLanes * (height == 4 ? kVectors<4> : height == 2 ? kVectors<2> : kVectors<1>);
}

inline int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

#if defined(__AVX2__) && !defined(__AVX512F__)
// s [4, 3] += four factors times three vectors, in all sixteen registers. Left to the compiler, one
// sum spills, and every column waits for its store. A factor is read by `load` at `row` of `from`.
#define LLMTRAIN_ROW(load, row, from, s0, s1, s2)                                 \
  load " " row "(%[" from "]), %%ymm15\n\tvfmadd231ps %%ymm15, %%ymm12, %[" s0 "]\n\t" \
  "vfmadd231ps %%ymm15, %%ymm13, %[" s1 "]\n\tvfmadd231ps %%ymm15, %%ymm14, %[" s2 "]\n\t"
#define LLMTRAIN_SUMS(s)                                                                   \
  [s0] "+x"(s[0]), [s1] "+x"(s[1]), [s2] "+x"(s[2]), [s3] "+x"(s[3]), [s4] "+x"(s[4]),     \
      [s5] "+x"(s[5]), [s6] "+x"(s[6]), [s7] "+x"(s[7]), [s8] "+x"(s[8]), [s9] "+x"(s[9]), \
      [s10] "+x"(s[10]), [s11] "+x"(s[11])

inline void add_column4(const float* w, const float* x, Vec* s) {
  asm volatile(
      "vmovups (%[x]), %%ymm12\n\tvmovups 32(%[x]), %%ymm13\n\tvmovups 64(%[x]), %%ymm14\n\t"
      LLMTRAIN_ROW("vbroadcastss", "0", "w", "s0", "s1", "s2")
      LLMTRAIN_ROW("vbroadcastss", "4", "w", "s3", "s4", "s5")
      LLMTRAIN_ROW("vbroadcastss", "8", "w", "s6", "s7", "s8")
      LLMTRAIN_ROW("vbroadcastss", "12", "w", "s9", "s10", "s11")
      : LLMTRAIN_SUMS(s)
      : [x] "r"(x), [w] "r"(w)
      : "memory", "xmm12", "xmm13", "xmm14", "xmm15");
}

// The same with three columns of x and tokens of four rows of dy, which lie kTokens apart.
inline void add_tokens4(const float* dy, const float* x, const float* y, const float* z, Vec* s) {
  static_assert(kTokens == 384);
  asm volatile(
      "vmovups (%[x]), %%ymm12\n\tvmovups (%[y]), %%ymm13\n\tvmovups (%[z]), %%ymm14\n\t"
      LLMTRAIN_ROW("vmovups", "0", "w", "s0", "s4", "s8")
      LLMTRAIN_ROW("vmovups", "1536", "w", "s1", "s5", "s9")
      LLMTRAIN_ROW("vmovups", "3072", "w", "s2", "s6", "s10")
      LLMTRAIN_ROW("vmovups", "4608", "w", "s3", "s7", "s11")
      : LLMTRAIN_SUMS(s)
      : [x] "r"(x), [y] "r"(y), [z] "r"(z), [w] "r"(dy)
      : "memory", "xmm12", "xmm13", "xmm14", "xmm15");
}
#undef LLMTRAIN_ROW
#undef LLMTRAIN_SUMS
#endif

// sum [H, V] += w [H] times x [V]. What there are fewer of is loaded first, and held.
template <int H>
inline void add_column(const float* w, const float* x, Vec* sum) {
  constexpr int V = kVectors<H>;
#if defined(__AVX2__) && !defined(__AVX512F__)
  if constexpr (H == 4) return add_column4(w, x, sum);
#endif
  if (H == 4) {
    Vec value[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) value[v] = load_once(x + v * kLanes);
#pragma GCC unroll 4
    for (int h = 0; h < H; ++h) {
      const Vec factor = splat(w + h);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) multiply_add(sum[h * V + v], factor, value[v]);
    }
  } else {
    Vec factor[H];
#pragma GCC unroll 2
    for (int h = 0; h < H; ++h) factor[h] = splat(w + h);
#pragma GCC unroll 12
    for (int v = 0; v < V; ++v) {
      const Vec value = H > 1 ? load_once(x + v * kLanes) : load_vec(x + v * kLanes);
#pragma GCC unroll 2
      for (int h = 0; h < H; ++h) multiply_add(sum[h * V + v], factor[h], value);
    }
  }
}

// Bands [begin, end) of a chunk, for one panel: x of the chunk's first column, sums of row 0.
template <int H, int W>
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
      for (int j = 0; j < W; ++j) add_column<H>(w + j * H, in + j * P, sum);
    }
#pragma GCC unroll 16
    for (int i = 0; i < H * V; ++i) store_vec(out + i * kLanes, sum[i]);
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

// Columns of x whose sums are in registers together, and vectors of tokens that each keeps apart.
// Single rows take fewer columns: twelve pointers do not fit into the registers.
template <int H>
constexpr int kColumns = H == 1 ? 4 : 12 / H;
template <int H>
constexpr int kApart = H == 1 ? 3 : 1;

// sum += tokens from t of H rows of dy times those of columns of x: [kColumns, H], thrice for H 1.
template <int H>
inline void add_tokens(const float* dy, const float* const* x, int64_t t, Vec* sum) {
  constexpr int G = kColumns<H>;
#if defined(__AVX2__) && !defined(__AVX512F__)
  if constexpr (H == 4) return add_tokens4(dy + t, x[0] + t, x[1] + t, x[2] + t, sum);
#endif
  if (H == 4) {
    Vec value[G];
#pragma GCC unroll 3
    for (int g = 0; g < G; ++g) value[g] = load_once(x[g] + t);
#pragma GCC unroll 4
    for (int h = 0; h < H; ++h) {
      const Vec factor = load_once(dy + h * kTokens + t);
#pragma GCC unroll 3
      for (int g = 0; g < G; ++g) multiply_add(sum[g * H + h], factor, value[g]);
    }
  } else if (H == 2) {
    Vec factor[H];
#pragma GCC unroll 2
    for (int h = 0; h < H; ++h) factor[h] = load_once(dy + h * kTokens + t);
#pragma GCC unroll 6
    for (int g = 0; g < G; ++g) {
      const Vec value = load_once(x[g] + t);
#pragma GCC unroll 2
      for (int h = 0; h < H; ++h) multiply_add(sum[g * H + h], factor[h], value);
    }
  } else {
#pragma GCC unroll 3
    for (int u = 0; u < kApart<H>; ++u) {
      const Vec factor = load_once(dy + t + u * kLanes);
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g)
        multiply_add(sum[u * G + g], factor, load_vec(x[g] + t + u * kLanes));
    }
  }
}

// The sums of tokens chunk `block`, for the bands [begin, end) of a chunk.
template <int H>
void gradient_bands(const SparseGradient& job, int64_t chunk, int64_t begin, int64_t end,
                    int64_t block) {
  constexpr int G = kColumns<H>, kStep = kApart<H> * kLanes;
  const SparseSide& side = job.side;
  const int64_t columns_up = round_up(side.columns, side.width);
  const float* dy = job.dy + block * side.bands() * H * kTokens;
  const float* x = job.x + (block * columns_up + chunk * side.chunk) * kTokens;
  const int64_t tokens = round_up(at_most(kTokens, job.tokens - block * kTokens), kStep);
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
      Vec sum[12] = {};
      for (int64_t t = 0; t < tokens; t += kStep) add_tokens<H>(rows, from, t, sum);
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
