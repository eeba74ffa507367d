// Every row and FP8 kernel of the CPU on buffers of exactly their size, on two threads, for the
// sanitizers: `make check-kernels`. Numbers are tested elsewhere.
#include <cstdio>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "fp8.h"
#include "fused.h"
#include "halves.h"
#include "rows.h"

namespace KERNEL_SET {
extern const llmtrain::KernelSet kernels;
extern const llmtrain::Fp8Kernels fp8;
extern const llmtrain::FusedSet fused;
}  // namespace KERNEL_SET

using llmtrain::bf16;

std::mt19937 draw(0);

void fill(float& x) {
  static const float far[] = {0.0f, -0.0f, 1e30f, -1e30f, 1e-40f,
                              std::numeric_limits<float>::infinity(),
                              -std::numeric_limits<float>::infinity(),
                              std::numeric_limits<float>::quiet_NaN()};
  x = draw() % 8 == 0 ? far[draw() % 8] : std::normal_distribution<float>(0.0f, 3.0f)(draw);
}

void fill(bf16& x) {
  float wide;
  fill(wide);
  x.bits = static_cast<uint16_t>(__builtin_bit_cast(uint32_t, wide) >> 16);
}

// Exactly n elements on the heap, `skip` of them from the allocation's start.
template <class T>
struct Buffer {
  std::unique_ptr<T[]> all;
  T* data;
  Buffer(int64_t n, int64_t skip = 0) : all(new T[n + skip]), data(all.get() + skip) {
    if constexpr (!std::is_same_v<T, uint8_t>)
      for (int64_t i = 0; i < n; ++i) fill(data[i]);
  }
};

template <class T>
void rows_of(int64_t n, int64_t d, const llmtrain::RowKernels<T>& rows,
             const llmtrain::FusedKernels<T>& fused) {
  Buffer<T> x(n * d, 1), branch(n * d, 1), weight(d, 1), bias(d, 1), total(n * d, 1), y(n * d, 1);
  Buffer<T> pairs(2 * n * d, 1), grads(2 * n * d, 1);
  Buffer<float> mean(n), rstd(n);
  Buffer<float> sums[4] = {d, d, d, d};  // of weight and bias for each part, as the operators do
  halves(n, 1, [&](int64_t begin, int64_t end) {
    const Buffer<float>&dweight = sums[end == n], &dbias = sums[2 + (end == n)];
    rows.rms_norm(x.data, weight.data, y.data, rstd.data, d, 1e-5f, begin, end);
    rows.add_rms_norm(x.data, branch.data, weight.data, total.data, y.data, rstd.data, d, 1e-5f,
                      begin, end);
    for (const T* residual : {static_cast<const T*>(nullptr), static_cast<const T*>(branch.data)}) {
      rows.rms_norm_backward(y.data, x.data, weight.data, rstd.data, residual, total.data,
                             dweight.data, d, begin, end);
      fused.layer_norm(x.data, weight.data, residual == nullptr ? nullptr : bias.data, y.data,
                       mean.data, rstd.data, d, 1e-5f, begin, end);
      fused.layer_norm_backward(y.data, x.data, weight.data, mean.data, rstd.data, residual,
                                total.data, dweight.data, dbias.data, d, begin, end);
      const int64_t at = begin * d;
      fused.join(x.data + at, residual == nullptr ? nullptr : residual + at, total.data + at, 0.9f,
                 (end - begin) * d);
    }
    for (int64_t a = 0; a < llmtrain::kSwiglu; ++a) {
      const int64_t at = begin * d, count = (end - begin) * d;
      fused.activate[a](x.data + at, y.data + at, count);
      fused.activate_backward[a](branch.data + at, x.data + at, total.data + at, count);
    }
    rows.swiglu(pairs.data, y.data, d, begin, end);
    rows.swiglu_backward(x.data, pairs.data, grads.data, d, begin, end);
  });
}

template <class T>
void casts_of(int64_t n, int64_t d, const llmtrain::Fp8Casts<T>& casts) {
  Buffer<T> x(n * d, 1), back(n * d, 1);
  Buffer<uint8_t> plain(n * d, 1), turned(n * d, 1);
  halves(n * d, 1, [&](int64_t begin, int64_t end) {
    casts.cast(x.data + begin, plain.data + begin, end - begin);
    casts.uncast(plain.data + begin, back.data + begin, end - begin);
  });
  halves(n, llmtrain::kFp8Tile, [&](int64_t begin, int64_t end) {
    casts.cast_transpose(x.data, plain.data, turned.data, n, d, begin, end);
  });
  halves(n, llmtrain::kFp8Tile, [&](int64_t begin, int64_t end) {
    KERNEL_SET::fp8.transpose(plain.data, turned.data, n, d, begin, end);
  });
}

int main() {
  for (int64_t n : {0, 1, 3, 17, 64, 70, 131})
    for (int64_t d : {1, 2, 7, 16, 31, 64, 65, 130, 2049}) {
      rows_of<float>(n, d, KERNEL_SET::kernels.f32, KERNEL_SET::fused.f32);
      rows_of<bf16>(n, d, KERNEL_SET::kernels.b16, KERNEL_SET::fused.b16);
      casts_of<float>(n, d, KERNEL_SET::fp8.e4m3_f32);
      casts_of<float>(n, d, KERNEL_SET::fp8.e5m2_f32);
      casts_of<bf16>(n, d, KERNEL_SET::fp8.e4m3_b16);
      casts_of<bf16>(n, d, KERNEL_SET::fp8.e5m2_b16);
    }
  std::puts("sanitized: clean");
}
