// Launchers of the norms and activations that cast their results to FP8.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace llmtrain {

// As csrc/cpu/fused.h numbers them. SwiGLU's input is twice as wide, gate and up in turn.
constexpr int64_t kGelu = 0, kGeluTanh = 1, kSilu = 2, kRelu = 3, kSwiglu = 4, kActivations = 5;

// A matrix [rows, columns], both multiples of 16, and what becomes of it. Addresses are multiples
// of 16 bytes; transposed [columns, rows] may be null.
struct Result {
  uint8_t *plain, *transposed;
  int64_t rows, columns;
};

// Pointers to float32 or bfloat16, alike in all. x, branch (null: none), bias (null: none), total
// and y (null: not written), statistics [rows] (mean: null for RMSNorm).
struct NormData {
  const void *x, *branch, *weight, *bias;
  void *total, *y;
  float *mean, *rstd;
  float eps, stay;
  bool bfloat16, layer;
};

// total = x + branch, y = norm(total), e4m3 of y. Without branch total is x and is not written.
cudaError_t add_norm_cast(const NormData& data, const Result& result, cudaStream_t stream);

// total = stay x + norm(branch), e4m3 of total.
cudaError_t norm_join_cast(const NormData& data, const Result& result, cudaStream_t stream);

// y = activation(x), e4m3 of y; y null: not written. Result: of y.
cudaError_t activation_cast(const void* x, void* y, bool bfloat16, int64_t activation,
                            const Result& result, cudaStream_t stream);

// dx from dy, e5m2 of factor dx. Result: of dx.
cudaError_t activation_backward_cast(const void* dy, const void* x, void* dx, bool bfloat16,
                                     int64_t activation, float factor, const Result& result,
                                     cudaStream_t stream);

}  // namespace llmtrain
