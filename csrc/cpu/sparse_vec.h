// Vectors of floats of a set, and the inner loops of sparse products that are written out.
// Included once per instruction set, inside its namespace (KERNEL_SET).
#pragma once

#include "sparse.h"
#ifdef __AVX2__
#include <immintrin.h>
#endif

// Assembly of the set; not where the set's intrinsics are emulated (csrc/check/avx512).
#if defined(__AVX512F__) && !defined(LLMTRAIN_EMULATED)
#define LLMTRAIN_ASM512
#elif defined(__AVX2__) && !defined(__AVX512F__)
#define LLMTRAIN_ASM256
#endif

namespace KERNEL_SET {

using llmtrain::kTokens;

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
#if defined(LLMTRAIN_ASM512)
  asm volatile("vbroadcastss %1, %0" : "=v"(out) : "m"(*x));
#elif defined(LLMTRAIN_ASM256)
  asm volatile("vbroadcastss %1, %0" : "=x"(out) : "m"(*x));
#else
  for (int l = 0; l < kLanes; ++l) out[l] = *x;
#endif
  return out;
}

// A zero for one use: the compiler would keep it in a register of its own through the loops.
inline Vec zero() {
  Vec out;
#if defined(LLMTRAIN_ASM512)
  asm volatile("vpxord %0, %0, %0" : "=v"(out));
#elif defined(LLMTRAIN_ASM256)
  asm volatile("vxorps %0, %0, %0" : "=x"(out));
#else
  out = Vec{};
#endif
  return out;
}

inline Vec load_once(const float* x) {
  Vec out;
#if defined(LLMTRAIN_ASM512)
  asm volatile("vmovups %1, %0" : "=v"(out) : "m"(*reinterpret_cast<const LooseVec*>(x)));
#elif defined(LLMTRAIN_ASM256)
  asm volatile("vmovups %1, %0" : "=x"(out) : "m"(*reinterpret_cast<const LooseVec*>(x)));
#else
  out = load_vec(x);
#endif
  return out;
}

// sum += a * b, with the sum staying where it is: left to choose, the compiler keeps it in the
// register of a factor, and then moves and spills.
inline void multiply_add(Vec& sum, const Vec& a, const Vec& b) {
#if defined(LLMTRAIN_ASM512)
  asm volatile("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(a), "vm"(b));
#elif defined(LLMTRAIN_ASM256)
  asm volatile("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(a), "xm"(b));
#else
  sum += a * b;
#endif
}

inline int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

#ifdef LLMTRAIN_ASM256
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

}  // namespace KERNEL_SET
