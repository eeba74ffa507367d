// What the operators share: typed access to tensors, checks, scratch memory.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "dispatch.h"

namespace llmtrain {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Pair = std::tuple<Tensor, Tensor>;
using Triple = std::tuple<Tensor, Tensor, Tensor>;

template <class T>
const T* in(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}

template <class T>
T* out(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

inline void check(const Tensor& x, ScalarType dtype, const char* name) {
  STD_TORCH_CHECK(x.scalar_type() == dtype, name, ": wrong dtype");
  STD_TORCH_CHECK(x.is_contiguous(), name, ": not contiguous");
}

// Calls fn with a null pointer of the storage type of `x`.
template <class F>
auto with_type(const Tensor& x, const F& fn) {
  if (x.scalar_type() == ScalarType::Float) return fn(static_cast<float*>(nullptr));
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::BFloat16, "float32 or bfloat16 only");
  return fn(static_cast<bf16*>(nullptr));
}

inline std::unique_ptr<float[]> uninitialised(int64_t n) {
  return std::make_unique_for_overwrite<float[]>(n);
}

inline int64_t row_count(const Tensor& x) { return x.numel() / std::max<int64_t>(1, x.size(-1)); }

// A head-major tensor [b, heads, s, d] with its strides, d contiguous.
template <class T>
struct Heads {
  T* data;
  int64_t batch, head, position;

  explicit Heads(const Tensor& x)
      : data(const_cast<T*>(in<T>(x))), batch(x.stride(0)), head(x.stride(1)),
        position(x.stride(2)) {
    STD_TORCH_CHECK(x.dim() == 4 && (x.stride(3) == 1 || x.size(3) == 1), "heads must be contiguous");
  }

  T* at(int64_t b, int64_t h, int64_t s) const {
    return data + b * batch + h * head + s * position;
  }
};

}  // namespace llmtrain
