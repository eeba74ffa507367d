// Kernels that work on rows, and the table through which an instruction set offers them.
#pragma once

#include <cstdint>

namespace llmtrain {

// bfloat16 as it lies in memory.
struct bf16 {
  uint16_t bits;
};

// A weighted softmax cross-entropy over rows of logits [rows, padded], `vocab` columns real.
struct CrossEntropy {
  int64_t vocab, padded;
  float z_loss, smoothing;
  bool grad;
};

// T is float or bf16; arithmetic is float32. Every kernel works on rows [begin, end).
template <class T>
struct RowKernels {
  // y = x * rstd * weight, rstd = 1 / sqrt(mean(x^2) + eps); rows of length d.
  void (*rms_norm)(const T* x, const T* weight, T* y, float* rstd, int64_t d, float eps,
                   int64_t begin, int64_t end);
  // sum = x + branch, y as above of sum.
  void (*add_rms_norm)(const T* x, const T* branch, const T* weight, T* sum, T* y, float* rstd,
                       int64_t d, float eps, int64_t begin, int64_t end);
  // dx from dy, plus `residual` when not null. Adds the weight's gradient to dweight [d].
  void (*rms_norm_backward)(const T* dy, const T* x, const T* weight, const float* rstd,
                            const T* residual, T* dx, float* dweight, int64_t d, int64_t begin,
                            int64_t end);
  // out [f] = silu(gate) * up of rows [gate, up] of length 2 f.
  void (*swiglu)(const T* x, T* out, int64_t f, int64_t begin, int64_t end);
  void (*swiglu_backward)(const T* dy, const T* x, T* dx, int64_t f, int64_t begin, int64_t end);
  // Turns the pairs (x[i], x[i + half]) of one head by the angles of cos, sin [half]; sign -1
  // turns back.
  void (*rotate)(const T* x, T* out, const float* cos, const float* sin, float sign,
                 int64_t half);
  // nll, loss and z-loss per row; with `grad` overwrites logits by the gradient times weights.
  // scratch: [vocab].
  void (*cross_entropy)(T* logits, const int64_t* targets, const float* weights, float* nll,
                        float* loss, float* z, float* scratch, const CrossEntropy& terms,
                        int64_t begin, int64_t end);
};

struct KernelSet {
  RowKernels<float> f32;
  RowKernels<bf16> b16;
};

}  // namespace llmtrain
