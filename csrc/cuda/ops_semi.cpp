// The operators llmtrain_cuda::* that pack 2:4 weights and multiply block-sparse ones.
#include "blocks.h"
#include "semi.h"
#include "tensors.h"

namespace llmtrain {

namespace {

using torch::stable::accelerator::DeviceGuard;

SemiMask semi_mask(const Tensor& kept, bool turned) {
  STD_TORCH_CHECK(kept.dim() == 2 && kept.is_contiguous() && kept.scalar_type() == ScalarType::Bool,
                  "kept: no contiguous matrix of bools");
  const int64_t height = kept.size(turned ? 1 : 0), length = kept.size(turned ? 0 : 1);
  STD_TORCH_CHECK(height % 32 == 0 && length % 16 == 0,
                  "kept: not in multiples of 32 rows and 16 columns");
  return {static_cast<const bool*>(kept.const_data_ptr()), kept.size(0), kept.size(1), turned};
}

// Tiles of 64 that cover `size`.
int64_t tiles_of(int64_t size) { return (size + kTile - 1) / kTile; }

__nv_bfloat16* tiles_at(const Tensor& values) {
  STD_TORCH_CHECK(values.dim() == 3 && values.size(1) == kTile && values.size(2) == kTile &&
                      values.is_contiguous() && values.scalar_type() == ScalarType::BFloat16,
                  "values: no tiles of 64 x 64 in bfloat16");
  auto* data = static_cast<__nv_bfloat16*>(values.mutable_data_ptr());
  STD_TORCH_CHECK(aligned(data), "values: not aligned to 16 bytes");
  return data;
}

}  // namespace

Tensor semi_meta_op(const Tensor& kept, bool turned) {
  const DeviceGuard guard(kept.get_device_index());
  const SemiMask mask = semi_mask(kept, turned);
  const std::vector<int64_t> shape = {kept.size(turned ? 1 : 0), kept.size(turned ? 0 : 1) / 16};
  Tensor meta = torch::stable::new_empty(kept, shape, ScalarType::Short);
  done(semi_meta(mask, static_cast<int16_t*>(meta.mutable_data_ptr()), stream_for(kept)));
  return meta;
}

void semi_repack_op(Tensor values, const Tensor& weight, const Tensor& kept, bool turned) {
  const DeviceGuard guard(values.get_device_index());
  const SemiMask mask = semi_mask(kept, turned);
  const bool half = is_bfloat16(weight);
  STD_TORCH_CHECK(weight.size(0) == kept.size(0) && weight.size(1) == kept.size(1),
                  "weight: not of the mask's shape");
  __nv_bfloat16* to = bf16_matrix(values, "values");
  STD_TORCH_CHECK(values.size(0) == kept.size(turned ? 1 : 0) &&
                      2 * values.size(1) == kept.size(turned ? 0 : 1),
                  "values: wrong shape");
  done(semi_repack(mask, weight.const_data_ptr(), half, to, stream_for(values)));
}

void block_pack_op(Tensor values, const Tensor& weight, const Tensor& rows_of,
                   const Tensor& cols_of) {
  const DeviceGuard guard(values.get_device_index());
  const int64_t tiles = values.size(0);
  const BlockPack job{weight.const_data_ptr(),
                      tiles_at(values),
                      indices(rows_of, tiles, "rows_of"),
                      indices(cols_of, tiles, "cols_of"),
                      weight.size(0),
                      weight.size(1),
                      tiles,
                      is_bfloat16(weight)};
  STD_TORCH_CHECK(job.rows % 8 == 0 && job.cols % 8 == 0, "weight: no multiples of 8");
  done(block_pack(job, stream_for(values)));
}

Tensor block_product_op(const Tensor& x, const Tensor& values, const std::optional<Tensor>& bias,
                        const Tensor& starts, const Tensor& others, const Tensor& place,
                        int64_t width, bool turned, double scale) {
  const DeviceGuard guard(x.get_device_index());
  const int64_t tiles = values.size(0);
  const std::vector<int64_t> shape = {x.size(0), width};
  Tensor y = torch::stable::new_empty(x, shape);
  const __nv_bfloat16* shift = nullptr;
  if (bias.has_value()) {
    STD_TORCH_CHECK(bias->scalar_type() == ScalarType::BFloat16 && bias->numel() == width &&
                        bias->is_contiguous(),
                    "bias: wrong dtype or size");
    shift = static_cast<const __nv_bfloat16*>(bias->const_data_ptr());
  }
  const BlockProduct job{bf16_matrix(x, "x"),
                         tiles_at(values),
                         shift,
                         bf16_matrix(y, "y"),
                         indices(starts, tiles_of(width) + 1, "starts"),
                         indices(others, tiles, "others"),
                         indices(place, tiles, "place"),
                         x.size(0),
                         x.size(1),
                         width,
                         static_cast<float>(scale)};
  done(block_product(job, turned, stream_for(x)));
  return y;
}

void block_gradient_op(Tensor out, const Tensor& dy, const Tensor& x, const Tensor& rows_of,
                       const Tensor& cols_of, double scale) {
  const DeviceGuard guard(out.get_device_index());
  STD_TORCH_CHECK(out.dim() == 2 && out.is_contiguous() && out.scalar_type() == ScalarType::Float,
                  "out: no contiguous matrix of float32");
  const int64_t tiles = rows_of.numel(), parts = gradient_parts(x.size(0), tiles);
  const std::vector<int64_t> shape = {parts > 1 ? parts * tiles * kTile * kTile : 0};
  Tensor partial = torch::stable::new_empty(out, shape);
  const BlockGradient job{bf16_matrix(dy, "dy"),
                          bf16_matrix(x, "x"),
                          static_cast<float*>(out.mutable_data_ptr()),
                          static_cast<float*>(partial.mutable_data_ptr()),
                          indices(rows_of, tiles, "rows_of"),
                          indices(cols_of, tiles, "cols_of"),
                          x.size(0),
                          out.size(0),
                          out.size(1),
                          tiles,
                          parts,
                          static_cast<float>(scale)};
  STD_TORCH_CHECK(dy.size(0) == job.n && dy.size(1) == job.rows && x.size(1) == job.cols,
                  "dy, x: not of the weight's shape");
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(job.out) % 8 == 0, "out: not aligned to 8 bytes");
  done(block_gradient(job, stream_for(out)));
}

STABLE_TORCH_LIBRARY_FRAGMENT(llmtrain_cuda, m) {
  m.def("semi_meta(Tensor kept, bool turned) -> Tensor");
  m.def("semi_repack_(Tensor(a!) values, Tensor weight, Tensor kept, bool turned) -> ()");
  m.def("block_pack_(Tensor(a!) values, Tensor weight, Tensor rows_of, Tensor cols_of) -> ()");
  m.def(
      "block_product(Tensor x, Tensor values, Tensor? bias, Tensor starts, Tensor others, "
      "Tensor place, int width, bool turned, float scale) -> Tensor");
  m.def(
      "block_gradient_(Tensor(a!) out, Tensor dy, Tensor x, Tensor rows_of, Tensor cols_of, "
      "float scale) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(llmtrain_cuda, CUDA, m) {
  m.impl("semi_meta", TORCH_BOX(&semi_meta_op));
  m.impl("semi_repack_", TORCH_BOX(&semi_repack_op));
  m.impl("block_pack_", TORCH_BOX(&block_pack_op));
  m.impl("block_product", TORCH_BOX(&block_product_op));
  m.impl("block_gradient_", TORCH_BOX(&block_gradient_op));
}

}  // namespace llmtrain
