// Attention and weight gradients of AVX512-BF16 and AMX on buffers of exactly their size, on two
// threads, for the sanitizers: `make check-kernels`. Numbers are tested elsewhere.
#include <cstdio>
#include <vector>

#include "attention.h"
#include "halves.h"
#include "products.h"

namespace KERNEL_SET {
extern const llmtrain::AttentionKernels attention;
extern const llmtrain::ProductKernels products;
}  // namespace KERNEL_SET

using namespace llmtrain;
using Halves = std::vector<bf16>;
using Floats = std::vector<float>;

Halves numbers(int64_t n) {
  static uint32_t state = 1;
  Halves out(n);
  for (bf16& x : out) {
    state = state * 1664525u + 1013904223u;
    x.bits = static_cast<uint16_t>(0x3f80u + (state >> 24 & 0x7fu) + (state >> 16 & 0x8000u));
  }
  return out;
}

// Two key heads with `group` query heads each, interleaved by position.
void attend(int64_t s, int64_t d, int64_t group, bool documents) {
  const AttentionKernels& kernels = KERNEL_SET::attention;
  const int64_t heads = 2 * group;
  Halves q = numbers(s * heads * d), k = numbers(s * 2 * d), v = numbers(s * 2 * d);
  Halves out(s * heads * d), dout = numbers(s * heads * d);
  Halves dq(s * heads * d), dk(s * 2 * d), dv(s * 2 * d);
  Floats lse(heads * s);
  std::vector<int32_t> first(s);
  for (int64_t i = 0; i < s; ++i) first[i] = static_cast<int32_t>(i / 5 * 5);
  const AttentionShape shape{s, d, group, 0.1f, documents ? first.data() : nullptr};
  halves(2, [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) {
      const auto many = [&](Halves& x) { return Matrix{x.data() + g * group * d, heads * d, d}; };
      const auto one = [&](Halves& x) { return Matrix{x.data() + g * d, 2 * d, d}; };
      Floats scratch(kernels.forward_scratch(s, d));
      kernels.forward(shape, many(q), one(k), one(v), many(out), lse.data() + g * group * s,
                      scratch.data());
      scratch.resize(kernels.backward_scratch(s, d));
      kernels.backward(shape, many(q), one(k), one(v), many(out), lse.data() + g * group * s,
                       many(dout), many(dq), one(dk), one(dv), scratch.data());
    }
  });
}

void multiply(int64_t n, int64_t rows, int64_t columns, bool add) {
  const ProductKernels& kernels = KERNEL_SET::products;
  const Halves grad = numbers(n * rows), x = numbers(n * columns);
  Floats out(rows * columns);
  const int64_t part = kernels.block_rows(rows, 2);
  const WeightGradient job{grad.data(), x.data(), out.data(), n, rows, columns, part, add};
  std::vector<uint32_t> packed(kernels.packed_words(n, columns));
  halves((n + 31) / 32, [&](int64_t begin, int64_t end) {
    kernels.pack(x.data(), n, columns, packed.data(), begin, end);
  });
  halves(kernels.blocks(job), [&](int64_t begin, int64_t end) {
    Floats scratch(kernels.scratch());
    for (int64_t i = begin; i < end; ++i) kernels.block(job, packed.data(), i, scratch.data());
  });
}

int main() {
  for (const int64_t s : {1, 31, 32, 70})
    for (const int64_t d : {32, 64}) {
      attend(s, d, 1, false);
      attend(s, d, 3, true);
    }
  for (const bool add : {false, true}) {
    multiply(1, 1, 1, add);
    multiply(45, 17, 33, add);
    multiply(70, 150, 20, add);
  }
  std::puts("clean");
}
