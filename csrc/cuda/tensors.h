// What the operators share: checks of tensors, the stream, errors.
#pragma once

#include <cuda_bf16.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace llmtrain {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline cudaStream_t stream_for(const Tensor& x) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

inline void done(cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, "CUDA: ", cudaGetErrorString(error));
}

inline bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// A contiguous matrix of bfloat16 whose rows are whole groups of 16 bytes.
inline __nv_bfloat16* bf16_matrix(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.dim() == 2 && x.is_contiguous(), name, ": no contiguous matrix");
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::BFloat16, name, ": bfloat16 only");
  STD_TORCH_CHECK(x.size(1) % 8 == 0, name, ": rows that are no multiple of 8");
  auto* data = static_cast<__nv_bfloat16*>(x.mutable_data_ptr());
  STD_TORCH_CHECK(aligned(data), name, ": not aligned to 16 bytes");
  return data;
}

inline const int32_t* indices(const Tensor& x, int64_t count, const char* name) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Int && x.is_contiguous() && x.numel() == count,
                  name, ": wrong dtype or size");
  return static_cast<const int32_t*>(x.const_data_ptr());
}

// A weight in float32 or bfloat16; whether it is the latter.
inline bool is_bfloat16(const Tensor& weight) {
  const bool half = weight.scalar_type() == ScalarType::BFloat16;
  STD_TORCH_CHECK(half || weight.scalar_type() == ScalarType::Float, "float32 or bfloat16 only");
  STD_TORCH_CHECK(weight.dim() == 2 && weight.is_contiguous(), "weight: no contiguous matrix");
  return half;
}

}  // namespace llmtrain
