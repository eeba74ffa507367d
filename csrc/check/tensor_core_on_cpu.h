// csrc/cuda/tensor_core.h in plain C++: the same functions, a warp's lanes as threads that meet at
// the warp's barrier. Copies are made as late as the waits allow, or at once, as the test asks: one
// finds a wait that is missing, the other a stage that is overwritten while it is read.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>
#include <cstring>
#include <vector>

namespace on_cpu {

struct Copy {
  void* to;
  const void* from;
};
inline bool late_copies = true;
inline thread_local std::vector<std::vector<Copy>> groups;  // oldest first
inline thread_local std::vector<Copy> open;
inline const __nv_bfloat16* row_of[32][32];
inline uint32_t left_of[32][32][4], right_of[32][32][2];

inline void make(const Copy& copy) {
  if (copy.from != nullptr)
    std::memcpy(copy.to, copy.from, 16);
  else
    std::memset(copy.to, 0, 16);
}

inline void meet() { warps[thread.x / 32]->arrive_and_wait(); }

inline float half_of(uint32_t pair, int which) {
  const uint32_t bits = which == 0 ? pair << 16 : pair & 0xffff0000u;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline uint32_t pair_at(const __nv_bfloat16* low, const __nv_bfloat16* high) {
  uint16_t a, b;
  std::memcpy(&a, low, 2);
  std::memcpy(&b, high, 2);
  return static_cast<uint32_t>(b) << 16 | a;
}

}  // namespace on_cpu

namespace llmtrain {

inline void copy16(void* to, const void* from, bool real) {
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0 || reinterpret_cast<uintptr_t>(from) % 16 != 0)
    std::abort();  // a GPU refuses such addresses
  const on_cpu::Copy copy{to, real ? from : nullptr};
  if (on_cpu::late_copies)
    on_cpu::open.push_back(copy);
  else
    on_cpu::make(copy);
}

inline void end_group() {
  on_cpu::groups.push_back(std::move(on_cpu::open));
  on_cpu::open.clear();
}

template <int kLeft>
void wait_groups() {
  auto& groups = on_cpu::groups;
  while (groups.size() > kLeft) {
    for (const auto& copy : groups.front()) on_cpu::make(copy);
    groups.erase(groups.begin());
  }
}

inline void gather_matrices(uint32_t (&to)[4], const __nv_bfloat16* row, bool transposed) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) std::abort();
  const unsigned warp = on_cpu::thread.x / 32, lane = on_cpu::thread.x % 32;
  on_cpu::row_of[warp][lane] = row;
  on_cpu::meet();
  for (unsigned m = 0; m < 4; ++m) {
    const auto* rows = on_cpu::row_of[warp] + 8 * m;
    const unsigned one = lane / 4, two = lane % 4 * 2;
    to[m] = transposed ? on_cpu::pair_at(rows[two] + one, rows[two + 1] + one)
                       : on_cpu::pair_at(rows[one] + two, rows[one] + two + 1);
  }
  on_cpu::meet();
}

inline void load_matrices(uint32_t (&to)[4], const __nv_bfloat16* row) {
  gather_matrices(to, row, false);
}

inline void load_transposed(uint32_t (&to)[4], const __nv_bfloat16* row) {
  gather_matrices(to, row, true);
}

// The fragments of mma.m16n8k16 as the PTX manual lays them out.
inline void multiply(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const unsigned warp = on_cpu::thread.x / 32, lane = on_cpu::thread.x % 32;
  std::memcpy(on_cpu::left_of[warp][lane], a, sizeof(a));
  on_cpu::right_of[warp][lane][0] = b0;
  on_cpu::right_of[warp][lane][1] = b1;
  on_cpu::meet();
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned row = lane / 4 + (i < 2 ? 0 : 8), column = lane % 4 * 2 + i % 2;
    for (unsigned k = 0; k < 16; ++k) {
      const unsigned owner = k % 8 / 2;
      const auto& left = on_cpu::left_of[warp][row % 8 * 4 + owner];
      const auto& right = on_cpu::right_of[warp][column * 4 + owner];
      sums[i] += on_cpu::half_of(left[row / 8 + k / 8 * 2], k % 2) *
                 on_cpu::half_of(right[k / 8], k % 2);
    }
  }
  on_cpu::meet();
}

}  // namespace llmtrain
