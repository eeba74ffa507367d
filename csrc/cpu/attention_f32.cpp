// Causal attention of one query head in float32, made of the products of gemm.cpp: blocks of rows
// of the scores, each only up to the last key that its queries see.
// Included once per instruction set, inside its namespace (KERNEL_SET).
#include <algorithm>
#include <cmath>

#include "gemm.h"
#include "number.h"

namespace KERNEL_SET {

using llmtrain::FloatAttention;
using llmtrain::Gemm;
using llmtrain::Strided;

extern const llmtrain::GemmKernels gemm;

namespace {

constexpr int64_t kQueries = 96;

// Room of b packed, whatever product of a head it belongs to: up to s keys of d values, or d columns
// of up to s keys or queries.
int64_t packed(const FloatAttention& job) {
  return std::max(gemm.packed({{}, {}, nullptr, 0, job.s, job.d, 0, 1, false}),
                  gemm.packed({{}, {}, nullptr, 0, job.d, job.s, 0, 1, false}));
}

// out (+)= alpha a b^T in this thread.
void multiply(const Gemm& job, float* memory, float* packed) {
  for (int64_t part = 0; part < gemm.parts(job); ++part) {
    gemm.pack(job, part, packed, 0, gemm.panels(job, part));
    const int64_t rows = gemm.block_rows(job, 1);
    for (int64_t i = 0; i < job.m; i += rows)
      gemm.block(job, part, packed, i, std::min(job.m, i + rows), memory);
  }
}

// A block of queries and the keys that one of them sees at least.
struct Span {
  int64_t query, queries, key, keys;
};

Span span(const FloatAttention& job, int64_t query) {
  const int64_t queries = std::min(kQueries, job.s - query);
  // A document begins no earlier than the one before it.
  const int64_t key = job.first == nullptr ? 0 : job.first[query];
  return {query, queries, key, query + queries - key};
}

Strided rows(const llmtrain::FloatMatrix& x, int64_t from) {
  return {x.data + from * x.row, x.row, 1};
}

Strided columns(const llmtrain::FloatMatrix& x, int64_t from) {
  return {x.data + from * x.row, 1, x.row};
}

// The scores of a block [queries, keys], scaled.
void scores(const FloatAttention& job, const Span& at, float* out, float* memory, float* space) {
  multiply({rows(job.q, at.query), rows(job.k, at.key), out, at.queries, at.keys, job.d, at.keys,
            job.scale, false},
           memory, space);
}

// Of a row of a block: the keys [first, last) that its query sees.
void seen(const FloatAttention& job, const Span& at, int64_t row, int64_t& first, int64_t& last) {
  first = job.first == nullptr ? 0 : job.first[at.query + row] - at.key;
  last = at.query + row + 1 - at.key;
}

int64_t scratch(int64_t s, int64_t d) {
  const FloatAttention job{s, d, 1.0f, nullptr, {}, {}, {}, {}, nullptr};
  return packed(job) + gemm.scratch() + 2 * kQueries * s;
}

void forward(const FloatAttention& job, float* memory) {
  float* space = memory + gemm.scratch();
  float* p = space + packed(job);
  for (int64_t query = 0; query < job.s; query += kQueries) {
    const Span at = span(job, query);
    scores(job, at, p, memory, space);
    for (int64_t r = 0; r < at.queries; ++r) {
      float* row = p + r * at.keys;
      int64_t first, last;
      seen(job, at, r, first, last);
      float top = row[first], sum = 0.0f;
#pragma omp simd reduction(max : top)
      for (int64_t j = first; j < last; ++j) top = row[j] > top ? row[j] : top;
#pragma omp simd reduction(+ : sum)
      for (int64_t j = first; j < last; ++j) {
        row[j] = exponential(row[j] - top);
        sum += row[j];
      }
      const float share = 1.0f / sum;
#pragma omp simd
      for (int64_t j = first; j < last; ++j) row[j] *= share;
      std::fill(row, row + first, 0.0f);
      std::fill(row + last, row + at.keys, 0.0f);
      job.lse[query + r] = top + std::log(sum);
    }
    float* out = job.out.data + query * job.out.row;
    multiply({{p, at.keys, 1}, columns(job.v, at.key), out, at.queries, job.d, at.keys, job.out.row,
              1.0f, false},
             memory, space);
  }
}

// dk and dv are added to.
void backward(const FloatAttention& job, const llmtrain::FloatGradients& grads, float* memory) {
  float* space = memory + gemm.scratch();
  float* p = space + packed(job);
  float* ds = p + kQueries * job.s;
  for (int64_t query = 0; query < job.s; query += kQueries) {
    const Span at = span(job, query);
    scores(job, at, p, memory, space);
    multiply({rows(grads.out, query), rows(job.v, at.key), ds, at.queries, at.keys, job.d, at.keys,
              1.0f, false},
             memory, space);
    for (int64_t r = 0; r < at.queries; ++r) {
      float *row = p + r * at.keys, *grad = ds + r * at.keys;
      const float* out = job.out.data + (query + r) * job.out.row;
      const float* dout = grads.out.data + (query + r) * grads.out.row;
      int64_t first, last;
      seen(job, at, r, first, last);
      float mean = 0.0f;
#pragma omp simd reduction(+ : mean)
      for (int64_t j = 0; j < job.d; ++j) mean += out[j] * dout[j];
      const float lse = job.lse[query + r];
#pragma omp simd
      for (int64_t j = first; j < last; ++j) {
        row[j] = exponential(row[j] - lse);
        grad[j] = row[j] * (grad[j] - mean) * job.scale;
      }
      for (float* x : {row, grad}) {
        std::fill(x, x + first, 0.0f);
        std::fill(x + last, x + at.keys, 0.0f);
      }
    }
    const Strided turned{ds, 1, at.keys};
    multiply({{ds, at.keys, 1}, columns(job.k, at.key), grads.q.data + query * grads.q.row,
              at.queries, job.d, at.keys, grads.q.row, 1.0f, false},
             memory, space);
    multiply({turned, columns(job.q, query), grads.k.data + at.key * grads.k.row, at.keys, job.d,
              at.queries, grads.k.row, 1.0f, true},
             memory, space);
    multiply({{p, 1, at.keys}, columns(grads.out, query), grads.v.data + at.key * grads.v.row,
              at.keys, job.d, at.queries, grads.v.row, 1.0f, true},
             memory, space);
  }
}

}  // namespace

extern const llmtrain::FloatAttentionKernels float_attention;
const llmtrain::FloatAttentionKernels float_attention{scratch, forward, backward};

}  // namespace KERNEL_SET
