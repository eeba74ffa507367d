// Runs every sparse kernel on two threads over buffers of exactly the sizes it may touch, for the
// sanitizers that tests/ops/test_sparse.py compiles this with, and compares with plain loops.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "../../csrc/check/halves.h"
#include "sparse.h"

namespace KERNEL_SET {
extern const llmtrain::SparseSet sparse;
extern const llmtrain::SparsePairs sparse_pairs;  // where AVX512-BF16 is emulated
}  // namespace KERNEL_SET

using namespace llmtrain;
using Floats = std::vector<float>;

namespace {

uint32_t state = 1;
// Multiples of 1 / 256 in [-0.5, 0.5), which bfloat16 holds as well.
float number() {
  state = state * 1664525u + 1013904223u;
  return static_cast<float>(state >> 24) / 256 - 0.5f;
}

Floats numbers(int64_t n) {
  Floats out(n);
  for (float& x : out) x = number();
  return out;
}

struct Matrix {
  std::vector<int32_t> starts{0}, columns_of;
  Floats values;
  SparseSide side;
};

Matrix matrix(const Floats& dense, const std::vector<bool>& kept, int64_t rows, int64_t columns,
              int64_t height, int64_t width, int64_t chunk) {
  Matrix m;
  m.side = {nullptr, nullptr, nullptr, rows, columns, height, width, chunk};
  const int64_t across = (columns + width - 1) / width, bands = m.side.bands();
  for (int64_t c = 0; c < m.side.chunks(); ++c)
    for (int64_t b = 0; b < bands; ++b) {
      for (int64_t t = c * chunk / width; t < across && t * width < (c + 1) * chunk; ++t) {
        if (!kept[b * across + t]) continue;
        m.columns_of.push_back(static_cast<int32_t>(t * width - c * chunk));
        for (int64_t j = t * width; j < (t + 1) * width; ++j)
          for (int64_t r = b * height; r < (b + 1) * height; ++r)
            m.values.push_back(r < rows && j < columns
                                   ? dense[r * columns + j]
                                   : 0.0f);
      }
      m.starts.push_back(static_cast<int32_t>(m.columns_of.size()));
    }
  m.side.starts = m.starts.data();
  m.side.columns_of = m.columns_of.data();
  m.side.values = m.values.data();
  return m;
}

void expect(float a, double b, const char* what) {
  if (std::fabs(a - b) < 1e-4) return;
  std::printf("%s: %g is not %g\n", what, a, b);
  std::exit(1);
}

void run(int64_t rows, int64_t columns, int64_t tokens, int64_t height, int64_t width) {
  const SparseSet& kernels = KERNEL_SET::sparse;
  const int64_t chunk = 64 * height, down = (rows + height - 1) / height;
  const int64_t across = (columns + width - 1) / width, size = height * width;
  Floats weight = numbers(rows * columns);
  std::vector<bool> kept(down * across);
  for (size_t i = 0; i < kept.size(); ++i) kept[i] = number() < 0.0f;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c)
      if (!kept[r / height * across + c / width]) weight[r * columns + c] = 0.0f;
  Matrix m = matrix(weight, kept, rows, columns, height, width, chunk);
  const Floats x = numbers(tokens * columns), dy = numbers(tokens * rows);

  Floats y(tokens * rows);
  const SparseProduct<float> product{m.side, x.data(), y.data(), tokens, columns, 2};
  const int64_t group = 2 * kernels.f32.panel(height), groups = (tokens + group - 1) / group;
  halves(groups, [&](int64_t begin, int64_t end) {
    Floats scratch(kernels.f32.scratch(product));
    for (int64_t i = begin; i < end; ++i) kernels.f32.group(product, i, scratch.data());
  });
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t r = 0; r < rows; ++r) {
      double sum = 0;
      for (int64_t c = 0; c < columns; ++c) sum += double{x[t * columns + c]} * weight[r * columns + c];
      expect(y[t * rows + r], sum, "product");
    }

  const int64_t chunks = (tokens + kTokens - 1) / kTokens, runs = m.side.chunks() * m.side.bands();
  Floats dy_turned(chunks * down * height * kTokens), x_turned(chunks * across * width * kTokens);
  halves(chunks, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      kernels.f32.turn(dy.data(), tokens, rows, height, dy_turned.data(), i);
      kernels.f32.turn(x.data(), tokens, columns, width, x_turned.data(), i);
    }
  });
  Floats grad(m.values.size(), NAN);
  const SparseGradient<float> gradient{m.side, dy_turned.data(), x_turned.data(), grad.data(), tokens};
  for (int64_t c = 0; c < m.side.chunks(); ++c)
    halves(m.side.bands(), [&](int64_t begin, int64_t end) { kernels.gradient(gradient, c, begin, end); });

  const int64_t tiles = static_cast<int64_t>(m.columns_of.size());
  std::vector<int32_t> place(tiles);
  for (int64_t i = 0; i < tiles; ++i) place[i] = static_cast<int32_t>(tiles - 1 - i);
  Floats packed(tiles * size, NAN), across_copy(tiles * size, NAN), first(tiles * size), second(tiles * size);
  const SparseCopies copies{m.side, place.data(), packed.data(), across_copy.data()};
  halves(runs, [&](int64_t begin, int64_t end) { kernels.repack(copies, weight.data(), begin, end); });
  for (int64_t i = 0; i < tiles * size; ++i) expect(packed[i], m.values[i], "repack");
  Floats dense(rows * columns);
  const SparseUpdate update{copies, grad.data(), first.data(), second.data(), dense.data(),
                            0.9f, 0.9f, 0.99f, 0.1f, 1e-8f, 10.0f};
  halves(runs, [&](int64_t begin, int64_t end) { kernels.adamw(update, begin, end); });
  halves(runs, [&](int64_t begin, int64_t end) { kernels.lion(update, begin, end); });

  int64_t tile = 0;
  for (int64_t i = 0; i < runs; ++i)
    for (; tile < m.starts[i + 1]; ++tile)
      for (int64_t j = 0; j < width; ++j)
        for (int64_t h = 0; h < height; ++h) {
          const int64_t r = i % m.side.bands() * height + h;
          const int64_t c = i / m.side.bands() * chunk + m.columns_of[tile] + j;
          if (r >= rows || c >= columns) continue;
          double sum = 0;
          for (int64_t t = 0; t < tokens; ++t)
            sum += double{dy[t * rows + r]} * x[t * columns + c];
          expect(grad[tile * size + j * height + h], sum, "gradient");
          const float value = packed[tile * size + j * height + h];
          expect(dense[r * columns + c], value, "dense copy");
          expect(across_copy[place[tile] * size + h * width + j], value, "transposed copy");
        }
}

#ifdef LLMTRAIN_EMULATED
using Halves = std::vector<bf16>;

Halves rounded(const Floats& x) {
  Halves out(x.size());
  for (size_t i = 0; i < x.size(); ++i)
    out[i].bits = static_cast<uint16_t>(__builtin_bit_cast(uint32_t, x[i]) >> 16);
  return out;
}

float widened(bf16 x) { return __builtin_bit_cast(float, uint32_t{x.bits} << 16); }

// The same of bfloat16 pairs: the words of a side, both products and the gradient.
void run_pairs(int64_t rows, int64_t columns, int64_t tokens, int64_t height, int64_t width) {
  const SparsePairs& kernels = KERNEL_SET::sparse_pairs;
  const int64_t chunk = 64 * height, down = (rows + height - 1) / height;
  const int64_t across = (columns + width - 1) / width;
  Floats weight = numbers(rows * columns);
  std::vector<bool> kept(down * across);
  for (size_t i = 0; i < kept.size(); ++i) kept[i] = number() < 0.0f;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c)
      if (!kept[r / height * across + c / width]) weight[r * columns + c] = 0.0f;
  Matrix m = matrix(weight, kept, rows, columns, height, width, chunk);
  const Floats x = numbers(tokens * columns), dy = numbers(tokens * rows);
  const Halves x16 = rounded(x), dy16 = rounded(dy);

  const int64_t runs = m.side.chunks() * m.side.bands();
  SparseSide side = m.side;
  side.columns = (columns + 1) / 2;
  side.chunk = chunk / 2;
  std::vector<int32_t> starts(runs + 1);
  if (width == 1) {
    halves(runs, [&](int64_t begin, int64_t end) { kernels.count(m.side, starts.data() + 1, begin, end); });
    for (int64_t i = 0; i < runs; ++i) starts[i + 1] += starts[i];
    side.starts = starts.data();
  } else {
    side.width = width / 2;
  }
  const int64_t tiles = side.starts[runs];
  std::vector<int32_t> columns_of(tiles);
  std::vector<uint32_t> words(tiles * side.width * height);
  const SparseWords packed{side.starts, columns_of.data(), words.data()};
  halves(runs, [&](int64_t begin, int64_t end) { kernels.pack(m.side, packed, begin, end); });
  side.columns_of = columns_of.data();
  side.values = reinterpret_cast<const float*>(words.data());

  Halves y(tokens * rows);
  const SparseProduct<bf16> product{side, x16.data(), y.data(), tokens, columns, 2};
  const int64_t group = 2 * kernels.panel(height), groups = (tokens + group - 1) / group;
  halves(groups, [&](int64_t begin, int64_t end) {
    Floats scratch(kernels.scratch(product));
    for (int64_t i = begin; i < end; ++i) kernels.group(product, i, scratch.data());
  });
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t r = 0; r < rows; ++r) {
      double sum = 0;
      for (int64_t c = 0; c < columns; ++c) sum += double{x[t * columns + c]} * weight[r * columns + c];
      expect((widened(y[t * rows + r]) - sum) / (1 + 40 * std::fabs(sum)), 0, "product of pairs");
    }

  const int64_t chunks = (tokens + kTokens - 1) / kTokens;
  Halves dy_turned(chunks * down * height * kTokens), x_turned(chunks * across * width * kTokens);
  halves(chunks, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      kernels.turn(dy16.data(), tokens, rows, height, dy_turned.data(), i);
      kernels.turn(x16.data(), tokens, columns, width, x_turned.data(), i);
    }
  });
  Floats grad(m.values.size(), NAN);
  const SparseGradient<bf16> gradient{m.side, dy_turned.data(), x_turned.data(), grad.data(), tokens};
  for (int64_t c = 0; c < m.side.chunks(); ++c)
    halves(m.side.bands(), [&](int64_t begin, int64_t end) { kernels.gradient(gradient, c, begin, end); });
  for (int64_t i = 0, tile = 0; i < runs; ++i)
    for (; tile < m.starts[i + 1]; ++tile)
      for (int64_t j = 0; j < width; ++j)
        for (int64_t h = 0; h < height; ++h) {
          const int64_t r = i % m.side.bands() * height + h;
          const int64_t c = i / m.side.bands() * chunk + m.columns_of[tile] + j;
          double sum = 0;
          for (int64_t t = 0; t < tokens && r < rows && c < columns; ++t)
            sum += double{dy[t * rows + r]} * x[t * columns + c];
          expect(grad[(tile * width + j) * height + h], sum, "gradient of pairs");
        }
}
#endif

void run_all(int64_t rows, int64_t columns, int64_t tokens, int64_t height, int64_t width) {
  run(rows, columns, tokens, height, width);
#ifdef LLMTRAIN_EMULATED
  run_pairs(rows, columns, tokens, height, width);
#endif
}

}  // namespace

int main() {
  for (const int64_t height : {1, 2, 4})
    for (const int64_t width : {1, 2, 4}) {
      run_all(37, 301, 83, height, width);
      run_all(6, 9, 2 * kTokens + 5, height, width);
      run_all(3, 2, 1, height, width);
    }
  std::printf("clean\n");
  return 0;
}
