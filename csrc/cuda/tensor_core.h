// What tensor cores need, a warp at a time: copies that run beside the arithmetic, loads of
// 8 x 8 matrices, and the product itself. sm_80 and later; csrc/check has the same in plain C++.
#pragma once

#ifdef LLMTRAIN_ON_CPU
#include "tensor_core_on_cpu.h"
#else

#include <cuda_bf16.h>

#include <cstdint>

namespace llmtrain {

__device__ inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// 16 bytes from global to shared memory, in the background; zeros where `real` is false, and then
// `from` is not read but must be an address. Both are multiples of 16 bytes.
__device__ inline void copy16(void* to, const void* from, bool real) {
  const int bytes = real ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(to)),
               "l"(__cvta_generic_to_global(from)), "r"(bytes)
               : "memory");
}

// Ends a group of this thread's copies.
__device__ inline void end_group() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

// Waits until at most `kLeft` of this thread's newest groups are under way.
template <int kLeft>
__device__ void wait_groups() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kLeft) : "memory");
}

// Four 8 x 8 matrices: lanes 8 m to 8 m + 7 give the rows of matrix m, 16 bytes each. Lane l gets
// of each matrix row l / 4, columns 2 (l % 4) and the next.
__device__ inline void load_matrices(uint32_t (&to)[4], const __nv_bfloat16* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

// The same of the transposed matrices: lane l gets rows 2 (l % 4) and the next of column l / 4.
__device__ inline void load_transposed(uint32_t (&to)[4], const __nv_bfloat16* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

// sums [16, 8] += a [16, 16] b [16, 8]. Lane l holds of `sums` rows l / 4 and l / 4 + 8, columns
// 2 (l % 4) and the next; of `a` the quarters (rows 0-7, 8-15) x (columns 0-7, 8-15), rows first;
// of `b` its upper and lower half, transposed.
__device__ inline void multiply(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0,
                                uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
      "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace llmtrain

#endif
