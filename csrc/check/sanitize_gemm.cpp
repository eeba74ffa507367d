// Float32 products and attention on buffers of exactly their size, on two threads, for the
// sanitizers: `make check-kernels`. Numbers are tested elsewhere.
#include <cstdio>
#include <vector>

#include "gemm.h"
#include "halves.h"

namespace KERNEL_SET {
extern const llmtrain::GemmKernels gemm;
extern const llmtrain::FloatAttentionKernels float_attention;
}  // namespace KERNEL_SET

using namespace llmtrain;
using Floats = std::vector<float>;

Floats numbers(int64_t n) {
  static uint32_t state = 1;
  Floats out(n);
  for (float& x : out) {
    state = state * 1664525u + 1013904223u;
    x = static_cast<float>(state >> 8) / (1 << 24) - 0.5f;
  }
  return out;
}

void multiply(int64_t m, int64_t n, int64_t k, bool turned, bool add) {
  const GemmKernels& kernels = KERNEL_SET::gemm;
  const Floats a = numbers(m * k), b = numbers(n * k);
  Floats out(m * n);
  const auto view = [&](const Floats& x, int64_t rows) {
    return turned ? Strided{x.data(), 1, rows} : Strided{x.data(), k, 1};
  };
  const Gemm job{view(a, m), view(b, n), out.data(), m, n, k, n, 0.5f, add};
  Floats packed(kernels.packed(job));
  const int64_t share = kernels.block_rows(job, 2);
  for (int64_t part = 0; part < kernels.parts(job); ++part) {
    halves(kernels.panels(job, part), [&](int64_t begin, int64_t end) {
      kernels.pack(job, part, packed.data(), begin, end);
    });
    halves((m + share - 1) / share, [&](int64_t begin, int64_t end) {
      Floats scratch(kernels.scratch());
      for (int64_t i = begin * share; i < m && i < end * share; i += share)
        kernels.block(job, part, packed.data(), i, i + share < m ? i + share : m, scratch.data());
    });
  }
}

// Two heads, each with keys of its own.
void attend(int64_t s, int64_t d, bool documents) {
  const FloatAttentionKernels& kernels = KERNEL_SET::float_attention;
  Floats x[8], lse(2 * s);
  for (Floats& part : x) part = numbers(s * 2 * d);
  std::vector<int32_t> first(s);
  for (int64_t i = 0; i < s; ++i) first[i] = static_cast<int32_t>(i / 5 * 5);
  halves(2, [&](int64_t begin, int64_t end) {
    for (int64_t h = begin; h < end; ++h) {
      const auto own = [&](int part) { return FloatMatrix{x[part].data() + h * d, 2 * d}; };
      const FloatAttention job{s,      d,      0.1f,   documents ? first.data() : nullptr,
                               own(0), own(1), own(2), own(3), lse.data() + h * s};
      Floats scratch(kernels.scratch(s, d));
      kernels.forward(job, scratch.data());
      kernels.backward(job, {own(4), own(5), own(6), own(7)}, scratch.data());
    }
  });
}

int main() {
  for (const bool turned : {false, true})
    for (const bool add : {false, true}) {
      multiply(1, 1, 1, turned, add);
      multiply(37, 19, 300, turned, add);
      multiply(150, 130, 65, turned, add);
      multiply(0, 3, 2, turned, add);
      multiply(3, 2, 0, turned, add);
      multiply(7, 1550, 515, turned, add);
    }
  for (const int64_t s : {1, 33, 70})
    for (const int64_t d : {8, 20, 64}) {
      attend(s, d, false);
      attend(s, d, true);
    }
  // Heads so wide that fewer keys take deeper steps than all of them.
  attend(520, 520, false);
  attend(200, 1, true);
  std::puts("clean");
}
