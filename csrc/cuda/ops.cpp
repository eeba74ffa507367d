// The operators llmtrain_cuda::* through torch's stable ABI (torch >= 2.11). A library of its own,
// loaded only where there is CUDA.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <string>
#include <tuple>

#include "fp8.h"

namespace llmtrain {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

ScalarType format(bool e5m2) {
  return e5m2 ? ScalarType::Float8_e5m2 : ScalarType::Float8_e4m3fn;
}

Source source(const Tensor& x, double factor) {
  const bool bfloat16 = x.scalar_type() == ScalarType::BFloat16;
  STD_TORCH_CHECK(bfloat16 || x.scalar_type() == ScalarType::Float, "float32 or bfloat16 only");
  STD_TORCH_CHECK(x.is_contiguous(), "x: not contiguous");
  return {x.const_data_ptr(), bfloat16, static_cast<float>(factor)};
}

uint8_t* bytes(const Tensor& x) { return static_cast<uint8_t*>(x.mutable_data_ptr()); }

cudaStream_t stream_of(const Tensor& x) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

void check(cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, "CUDA: ", cudaGetErrorString(error));
}

Tensor fp8_cast(const Tensor& x, bool e5m2, double factor) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Source from = source(x, factor);
  Tensor y = torch::stable::new_empty(x, x.sizes(), format(e5m2));
  check(cast(from, bytes(y), x.numel(), e5m2, stream_of(x)));
  return y;
}

std::tuple<Tensor, Tensor> fp8_cast_transpose(const Tensor& x, bool e5m2, double factor) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  STD_TORCH_CHECK(x.dim() == 2, "x: two dimensions");
  const Source from = source(x, factor);
  const int64_t rows = x.size(0), columns = x.size(1);
  Tensor y = torch::stable::new_empty(x, {rows, columns}, format(e5m2));
  Tensor t = torch::stable::new_empty(x, {columns, rows}, format(e5m2));
  check(cast_transpose(from, bytes(y), bytes(t), rows, columns, e5m2, stream_of(x)));
  return {y, t};
}

Tensor fp8_transpose(const Tensor& x) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  STD_TORCH_CHECK(x.dim() == 2, "x: two dimensions");
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float8_e4m3fn ||
                      x.scalar_type() == ScalarType::Float8_e5m2,
                  "x: wrong dtype");
  STD_TORCH_CHECK(x.is_contiguous(), "x: not contiguous");
  const int64_t rows = x.size(0), columns = x.size(1);
  Tensor y = torch::stable::new_empty(x, {columns, rows}, x.scalar_type());
  const auto* from = static_cast<const uint8_t*>(x.const_data_ptr());
  check(transpose(from, bytes(y), rows, columns, stream_of(x)));
  return y;
}

std::string sources() { return LLMTRAIN_SOURCES; }

STABLE_TORCH_LIBRARY(llmtrain_cuda, m) {
  m.def("fp8_cast(Tensor x, bool e5m2, float factor) -> Tensor");
  m.def("fp8_cast_transpose(Tensor x, bool e5m2, float factor) -> (Tensor, Tensor)");
  m.def("fp8_transpose(Tensor x) -> Tensor");
  m.def("sources() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(llmtrain_cuda, CUDA, m) {
  m.impl("fp8_cast", TORCH_BOX(&fp8_cast));
  m.impl("fp8_cast_transpose", TORCH_BOX(&fp8_cast_transpose));
  m.impl("fp8_transpose", TORCH_BOX(&fp8_transpose));
}

STABLE_TORCH_LIBRARY_IMPL(llmtrain_cuda, CompositeExplicitAutograd, m) {
  m.impl("sources", TORCH_BOX(&sources));
}

}  // namespace llmtrain

// For `llmtrain doctor`, which asks without CUDA too.
extern "C" __attribute__((visibility("default"))) const char* llmtrain_cuda_architectures() {
  return LLMTRAIN_ARCHITECTURES;
}
