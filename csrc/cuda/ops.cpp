// The operators llmtrain_cuda::* through torch's stable ABI (torch >= 2.11). A library of its own,
// loaded only where there is CUDA.
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "fp8.h"
#include "fused.h"
#include "tensors.h"

namespace llmtrain {

ScalarType format(bool e5m2) {
  return e5m2 ? ScalarType::Float8_e5m2 : ScalarType::Float8_e4m3fn;
}

Source source(const Tensor& x, double factor) {
  const bool bfloat16 = x.scalar_type() == ScalarType::BFloat16;
  STD_TORCH_CHECK(bfloat16 || x.scalar_type() == ScalarType::Float, "float32 or bfloat16 only");
  STD_TORCH_CHECK(x.is_contiguous(), "x: not contiguous");
  return {x.const_data_ptr(), bfloat16, static_cast<float>(factor), false};
}

uint8_t* bytes(const Tensor& x) { return static_cast<uint8_t*>(x.mutable_data_ptr()); }

Tensor fp8_cast(const Tensor& x, bool e5m2, double factor) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Source from = source(x, factor);
  Tensor y = torch::stable::new_empty(x, x.sizes(), format(e5m2));
  done(cast(from, bytes(y), x.numel(), e5m2, stream_for(x)));
  return y;
}

std::tuple<Tensor, Tensor> fp8_cast_transpose(const Tensor& x, bool e5m2, double factor) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  STD_TORCH_CHECK(x.dim() == 2, "x: two dimensions");
  const Source from = source(x, factor);
  const int64_t rows = x.size(0), columns = x.size(1);
  Tensor y = torch::stable::new_empty(x, {rows, columns}, format(e5m2));
  Tensor t = torch::stable::new_empty(x, {columns, rows}, format(e5m2));
  done(cast_transpose(from, bytes(y), bytes(t), rows, columns, e5m2, stream_for(x)));
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
  done(transpose(from, bytes(y), rows, columns, stream_for(x)));
  return y;
}

// Master weights in float32, rounded to bfloat16 and cast to e4m3 with their transposed copy.
std::tuple<Tensor, Tensor> fp8_weight(const Tensor& x) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  STD_TORCH_CHECK(x.dim() == 2 && x.scalar_type() == ScalarType::Float, "x: a float32 matrix");
  Source from = source(x, 1.0);
  from.master = true;
  const int64_t rows = x.size(0), columns = x.size(1);
  Tensor y = torch::stable::new_empty(x, {rows, columns}, format(false));
  Tensor t = torch::stable::new_empty(x, {columns, rows}, format(false));
  done(cast_transpose(from, bytes(y), bytes(t), rows, columns, false, stream_for(x)));
  return {y, t};
}

constexpr int64_t kMultiple = 16;

// x, or a copy that begins at a multiple of 16 bytes: compiled code cannot ask for addresses and may
// pass a view that begins anywhere.
Tensor aligned(const Tensor& x) {
  return aligned(x.const_data_ptr()) ? x : torch::stable::clone(x);
}

std::optional<Tensor> aligned(const std::optional<Tensor>& x) {
  return x ? std::optional<Tensor>(aligned(*x)) : std::nullopt;
}

// A contiguous float32 or bfloat16 tensor that begins at a multiple of 16 bytes.
const void* operand(const Tensor& x, ScalarType dtype, const char* name) {
  STD_TORCH_CHECK(x.scalar_type() == dtype, name, ": wrong dtype");
  STD_TORCH_CHECK(x.is_contiguous(), name, ": not contiguous");
  STD_TORCH_CHECK(aligned(x.const_data_ptr()), name, ": not aligned");
  return x.const_data_ptr();
}

bool is_bf16(const Tensor& x) {
  const bool bfloat16 = x.scalar_type() == ScalarType::BFloat16;
  STD_TORCH_CHECK(bfloat16 || x.scalar_type() == ScalarType::Float, "float32 or bfloat16 only");
  return bfloat16;
}

// The FP8 copies of a result of this shape: as it lies, and transposed or empty.
struct Copies {
  Tensor plain, turned;
  Result result;

  Copies(const Tensor& like, const std::vector<int64_t>& shape, bool e5m2, bool transposed)
      : plain(torch::stable::new_empty(like, shape, format(e5m2))),
        turned(torch::stable::new_empty(like, {0}, format(e5m2))),
        result{} {
    STD_TORCH_CHECK(!shape.empty(), "x: at least one dimension");
    const int64_t columns = shape.back();
    const int64_t rows = columns == 0 ? 0 : plain.numel() / columns;
    STD_TORCH_CHECK(rows % kMultiple == 0 && columns % kMultiple == 0,
                    "rows and columns must be multiples of 16");
    if (transposed) turned = torch::stable::new_empty(like, {columns, rows}, format(e5m2));
    result = {bytes(plain), transposed ? bytes(turned) : nullptr, rows, columns};
  }
};

std::vector<int64_t> shape_of(const Tensor& x) { return {x.sizes().begin(), x.sizes().end()}; }

void* written(const Tensor& x) { return x.mutable_data_ptr(); }

// Everything of a norm but its input and output. Statistics: [rows], mean empty for RMSNorm.
struct Norm {
  Tensor mean, rstd;
  NormData data;

  Norm(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, double eps,
       bool layer, int64_t rows)
      : mean(torch::stable::new_empty(x, {layer ? rows : 0}, ScalarType::Float)),
        rstd(torch::stable::new_empty(x, {rows}, ScalarType::Float)),
        data{} {
    const ScalarType dtype = x.scalar_type();
    data.bfloat16 = is_bf16(x);
    data.layer = layer;
    data.eps = static_cast<float>(eps);
    data.weight = operand(weight, dtype, "weight");
    STD_TORCH_CHECK(weight.numel() == x.size(-1), "weight: wrong length");
    STD_TORCH_CHECK(!bias || (layer && bias->numel() == weight.numel()),
                    "bias: of LayerNorm only, as the weight");
    if (bias) data.bias = operand(*bias, dtype, "bias");
    data.mean = layer ? static_cast<float*>(written(mean)) : nullptr;
    data.rstd = static_cast<float*>(written(rstd));
  }
};

using Five = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
using Six = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Six add_norm_cast_op(const Tensor& x_, const std::optional<Tensor>& branch_,
                     const Tensor& weight_, const std::optional<Tensor>& bias_, double eps,
                     bool layer, bool turned, bool keep) {
  const torch::stable::accelerator::DeviceGuard guard(x_.get_device_index());
  const Tensor x = aligned(x_), weight = aligned(weight_);
  const std::optional<Tensor> branch = aligned(branch_), bias = aligned(bias_);
  const std::vector<int64_t> shape = shape_of(x), none = {0};
  const Copies copies(x, shape, false, turned);
  Norm norm(x, weight, bias, eps, layer, copies.result.rows);
  Tensor total = torch::stable::new_empty(x, branch ? shape : none);
  Tensor y = torch::stable::new_empty(x, keep ? shape : none);
  norm.data.x = operand(x, x.scalar_type(), "x");
  if (branch) {
    STD_TORCH_CHECK(branch->numel() == x.numel(), "branch: wrong shape");
    norm.data.branch = operand(*branch, x.scalar_type(), "branch");
    norm.data.total = written(total);
  }
  norm.data.y = keep ? written(y) : nullptr;
  done(add_norm_cast(norm.data, copies.result, stream_for(x)));
  return {total, y, norm.mean, norm.rstd, copies.plain, copies.turned};
}

Five norm_join_cast_op(const Tensor& x_, const Tensor& branch_, const Tensor& weight_,
                       const std::optional<Tensor>& bias_, double eps, bool layer, double stay,
                       bool turned) {
  const torch::stable::accelerator::DeviceGuard guard(x_.get_device_index());
  const Tensor x = aligned(x_), branch = aligned(branch_), weight = aligned(weight_);
  const std::optional<Tensor> bias = aligned(bias_);
  const Copies copies(x, shape_of(x), false, turned);
  Norm norm(branch, weight, bias, eps, layer, copies.result.rows);
  STD_TORCH_CHECK(branch.numel() == x.numel(), "branch: wrong shape");
  Tensor total = torch::stable::empty_like(x);
  norm.data.x = operand(x, branch.scalar_type(), "x");
  norm.data.branch = operand(branch, branch.scalar_type(), "branch");
  norm.data.total = written(total);
  norm.data.stay = static_cast<float>(stay);
  done(norm_join_cast(norm.data, copies.result, stream_for(x)));
  return {total, norm.mean, norm.rstd, copies.plain, copies.turned};
}

void check_activation(const Tensor& x, int64_t activation) {
  STD_TORCH_CHECK(activation >= 0 && activation < kActivations, "activation: no such number");
  STD_TORCH_CHECK(activation != kSwiglu || x.size(-1) % 2 == 0, "x: odd width");
}

std::tuple<Tensor, Tensor, Tensor> activation_cast_op(const Tensor& x_, int64_t activation,
                                                      bool turned, bool keep) {
  const torch::stable::accelerator::DeviceGuard guard(x_.get_device_index());
  const Tensor x = aligned(x_);
  check_activation(x, activation);
  std::vector<int64_t> shape = shape_of(x);
  const std::vector<int64_t> none = {0};
  if (activation == kSwiglu) shape.back() /= 2;
  const Copies copies(x, shape, false, turned);
  Tensor y = torch::stable::new_empty(x, keep ? shape : none);
  done(activation_cast(operand(x, x.scalar_type(), "x"), keep ? written(y) : nullptr, is_bf16(x),
                        activation, copies.result, stream_for(x)));
  return {y, copies.plain, copies.turned};
}

std::tuple<Tensor, Tensor, Tensor> activation_backward_cast_op(const Tensor& dy_,
                                                               const Tensor& x_,
                                                               int64_t activation, double factor,
                                                               bool turned) {
  const torch::stable::accelerator::DeviceGuard guard(x_.get_device_index());
  const Tensor x = aligned(x_), dy = aligned(dy_);
  check_activation(x, activation);
  STD_TORCH_CHECK(dy.numel() * (activation == kSwiglu ? 2 : 1) == x.numel(), "wrong shapes");
  const Copies copies(x, shape_of(x), true, turned);
  Tensor dx = torch::stable::empty_like(x);
  done(activation_backward_cast(operand(dy, x.scalar_type(), "dy"),
                                 operand(x, x.scalar_type(), "x"), written(dx), is_bf16(x),
                                 activation, static_cast<float>(factor), copies.result,
                                 stream_for(x)));
  return {dx, copies.plain, copies.turned};
}

std::string sources() { return LLMTRAIN_SOURCES; }

std::string device_fault() {
  const cudaError_t error = probe();
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

STABLE_TORCH_LIBRARY(llmtrain_cuda, m) {
  m.def("fp8_cast(Tensor x, bool e5m2, float factor) -> Tensor");
  m.def("fp8_cast_transpose(Tensor x, bool e5m2, float factor) -> (Tensor, Tensor)");
  m.def("fp8_transpose(Tensor x) -> Tensor");
  m.def("fp8_weight(Tensor x) -> (Tensor, Tensor)");
  m.def(
      "add_norm_cast(Tensor x, Tensor? branch, Tensor weight, Tensor? bias, float eps, "
      "bool layer, bool turned, bool keep) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "norm_join_cast(Tensor x, Tensor branch, Tensor weight, Tensor? bias, float eps, "
      "bool layer, float stay, bool turned) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "activation_cast(Tensor x, int activation, bool turned, bool keep) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "activation_backward_cast(Tensor dy, Tensor x, int activation, float factor, bool turned) "
      "-> (Tensor, Tensor, Tensor)");
  m.def("sources() -> str");
  m.def("device_fault() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(llmtrain_cuda, CUDA, m) {
  m.impl("fp8_cast", TORCH_BOX(&fp8_cast));
  m.impl("fp8_cast_transpose", TORCH_BOX(&fp8_cast_transpose));
  m.impl("fp8_transpose", TORCH_BOX(&fp8_transpose));
  m.impl("fp8_weight", TORCH_BOX(&fp8_weight));
  m.impl("add_norm_cast", TORCH_BOX(&add_norm_cast_op));
  m.impl("norm_join_cast", TORCH_BOX(&norm_join_cast_op));
  m.impl("activation_cast", TORCH_BOX(&activation_cast_op));
  m.impl("activation_backward_cast", TORCH_BOX(&activation_backward_cast_op));
}

STABLE_TORCH_LIBRARY_IMPL(llmtrain_cuda, CompositeExplicitAutograd, m) {
  m.impl("sources", TORCH_BOX(&sources));
  m.impl("device_fault", TORCH_BOX(&device_fault));
}

}  // namespace llmtrain

// For `llmtrain doctor`, which asks without CUDA too.
extern "C" __attribute__((visibility("default"))) const char* llmtrain_cuda_architectures() {
  return LLMTRAIN_ARCHITECTURES;
}
