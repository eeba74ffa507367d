// The operators llmtrain_cuda::* of sparse training, through torch's stable ABI (torch >= 2.11).
#include "sparse.h"
#include "tensors.h"

namespace llmtrain {

namespace {

BlockMask mask_of(const Tensor& x, const Tensor& kept, int64_t high, int64_t wide) {
  STD_TORCH_CHECK(x.dim() == 2 && kept.dim() == 2, "x, kept: two dimensions");
  STD_TORCH_CHECK(x.is_contiguous() && kept.is_contiguous(), "x, kept: not contiguous");
  STD_TORCH_CHECK(kept.scalar_type() == ScalarType::Bool, "kept: wrong dtype");
  STD_TORCH_CHECK(high > 0 && wide > 0 && kept.size(0) == (x.size(0) + high - 1) / high &&
                      kept.size(1) == (x.size(1) + wide - 1) / wide,
                  "kept: wrong shape");
  return {static_cast<const bool*>(kept.const_data_ptr()), x.size(0), x.size(1), high, wide,
          kept.size(1)};
}

float* floats(const Tensor& x, const Tensor& like) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float && x.is_contiguous() && x.dim() == 2 &&
                      x.size(0) == like.size(0) && x.size(1) == like.size(1),
                  "wrong dtype or shape");
  return static_cast<float*>(x.mutable_data_ptr());
}

}  // namespace

void mask_apply_(Tensor x, const Tensor& kept, int64_t high, int64_t wide) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const bool whole = x.scalar_type() == ScalarType::Float;
  STD_TORCH_CHECK(whole || x.scalar_type() == ScalarType::BFloat16, "float32 or bfloat16 only");
  done(mask_apply(x.mutable_data_ptr(), whole ? 4 : 2, mask_of(x, kept, high, wide),
                  stream_for(x)));
}

Tensor transposable_mask(const Tensor& scores, const Tensor& patterns) {
  const torch::stable::accelerator::DeviceGuard guard(scores.get_device_index());
  STD_TORCH_CHECK(scores.dim() == 2 && scores.size(0) % 4 == 0 && scores.size(1) % 4 == 0,
                  "scores: not in tiles of 4 x 4");
  STD_TORCH_CHECK(patterns.scalar_type() == ScalarType::Int && patterns.is_contiguous() &&
                      patterns.numel() > 0,
                  "patterns: wrong dtype");
  Tensor kept = torch::stable::new_empty(scores, scores.sizes(), ScalarType::Bool);
  done(transposable(floats(scores, scores), static_cast<bool*>(kept.mutable_data_ptr()),
                    scores.size(0), scores.size(1),
                    static_cast<const int32_t*>(patterns.const_data_ptr()),
                    static_cast<int>(patterns.numel()), stream_for(scores)));
  return kept;
}

// factors: as in csrc/cpu/ops_sparse.cpp.
void masked_adamw_(Tensor weight, const Tensor& grad, Tensor first, Tensor second,
                   const Tensor& kept, int64_t high, int64_t wide, double decay, double beta1,
                   double beta2, double rate, double eps, double root) {
  const torch::stable::accelerator::DeviceGuard guard(weight.get_device_index());
  const auto f = [](double x) { return static_cast<float>(x); };
  const MaskedAdamW job{floats(weight, weight), floats(first, weight), floats(second, weight),
                        floats(grad, weight),   f(decay),              f(beta1),
                        f(beta2),               f(rate),               f(eps),
                        f(root)};
  done(masked_adamw(job, mask_of(weight, kept, high, wide), stream_for(weight)));
}

STABLE_TORCH_LIBRARY_FRAGMENT(llmtrain_cuda, m) {
  m.def("mask_apply_(Tensor(a!) x, Tensor kept, int high, int wide) -> ()");
  m.def("transposable_mask(Tensor scores, Tensor patterns) -> Tensor");
  m.def(
      "masked_adamw_(Tensor(a!) weight, Tensor grad, Tensor(b!) first, Tensor(c!) second, Tensor "
      "kept, int high, int wide, float decay, float beta1, float beta2, float rate, float eps, "
      "float root) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(llmtrain_cuda, CUDA, m) {
  m.impl("mask_apply_", TORCH_BOX(&mask_apply_));
  m.impl("transposable_mask", TORCH_BOX(&transposable_mask));
  m.impl("masked_adamw_", TORCH_BOX(&masked_adamw_));
}

}  // namespace llmtrain
