// Row kernels whose results are cast to FP8 while they are in the cache (ops_fused.cpp), and the
// table through which an instruction set offers them.
#pragma once

#include <cstdint>

#include "rows.h"

namespace llmtrain {

// Numbers of the activations, as llmtrain/ops/fused.py has them. SwiGLU's rows are twice as wide.
constexpr int64_t kGelu = 0, kGeluTanh = 1, kSilu = 2, kRelu = 3, kSwiglu = 4, kActivations = 5;

// T is float or bf16; arithmetic is float32.
template <class T>
struct FusedKernels {
  // y = (x - mean) * rstd * weight + bias over rows of length d; bias may be null. Rows
  // [begin, end).
  void (*layer_norm)(const T* x, const T* weight, const T* bias, T* y, float* mean, float* rstd,
                     int64_t d, float eps, int64_t begin, int64_t end);
  // dx from dy, plus `residual` when not null. Adds the gradients of weight and bias to
  // dweight [d] and dbias [d].
  void (*layer_norm_backward)(const T* dy, const T* x, const T* weight, const float* mean,
                              const float* rstd, const T* residual, T* dx, float* dweight,
                              float* dbias, int64_t d, int64_t begin, int64_t end);
  // out = stay * a + b, rounded once; n elements. b null: stay * a.
  void (*join)(const T* a, const T* b, T* out, float stay, int64_t n);
  // n elements of the result; SwiGLU's x has 2 n. Null at kSwiglu: see RowKernels.
  void (*activate[kActivations])(const T* x, T* y, int64_t n);
  void (*activate_backward[kActivations])(const T* dy, const T* x, T* dx, int64_t n);
};

struct FusedSet {
  FusedKernels<float> f32;
  FusedKernels<bf16> b16;
};

}  // namespace llmtrain
