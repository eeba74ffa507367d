// Products of float32 matrices and attention made of them, and the tables of their implementations.
#pragma once

#include <cstdint>

namespace llmtrain {

// A matrix of which element (i, j) lies at data[i * row + j * step].
struct Strided {
  const float* data;
  int64_t row, step;
};

// out [m, n] (+)= alpha a b^T, rows of out `out_row` apart; a [m, k], b [n, k].
struct Gemm {
  Strided a, b;
  float* out;
  int64_t m, n, k, out_row;
  float alpha;
  bool add;
};

// A product is a sequence of parts (see `part`), in each of which b is packed by panels and rows
// of out follow by blocks. Each element is summed in an order that depends on k alone.
struct GemmKernels {
  // Parts of a product, and the float32 scratch that holds b packed: enough for all products of no
  // larger n and k.
  int64_t (*parts)(const Gemm& job);
  int64_t (*packed)(const Gemm& job);
  int64_t (*panels)(const Gemm& job, int64_t part);
  void (*pack)(const Gemm& job, int64_t part, float* packed, int64_t begin, int64_t end);
  // Blocks of rows such that every thread has work, and the scratch that computing one takes.
  int64_t (*block_rows)(const Gemm& job, int64_t threads);
  int64_t (*scratch)();
  void (*block)(const Gemm& job, int64_t part, const float* packed, int64_t begin, int64_t end,
                float* scratch);
};

// Positions are rows, `row` elements apart.
struct FloatMatrix {
  float* data;
  int64_t row;
};

// Causal attention of one query head: s positions of d values. first[i]: the first key that query
// i sees (it sees first[i]..i), or null for 0. lse [s]: the log-sum-exp of the scores.
struct FloatAttention {
  int64_t s, d;
  float scale;
  const int32_t* first;
  FloatMatrix q, k, v, out;
  float* lse;
};

struct FloatGradients {
  FloatMatrix out, q, k, v;
};

struct FloatAttentionKernels {
  // Elements of float32 scratch.
  int64_t (*scratch)(int64_t s, int64_t d);
  // Writes out and lse.
  void (*forward)(const FloatAttention& job, float* scratch);
  // Writes the gradient of q and adds to those of k and v.
  void (*backward)(const FloatAttention& job, const FloatGradients& grads, float* scratch);
};

}  // namespace llmtrain
