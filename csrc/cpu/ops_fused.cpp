// The operators llmtrain::*_cast on CPU tensors, through torch's stable ABI (torch >= 2.11): norms
// and activations whose results are cast to FP8 while they are in the cache. What is cast is the
// result as it is stored, so that the bytes are those of the separate passes.
#include "bindings.h"

namespace llmtrain {

// Rows that are worth a thread. With a transposed copy, whole tiles.
constexpr int64_t kCastBlock = kFp8Tile;
constexpr int64_t kSums = 128;  // rows of a norm's gradients summed by one thread, as in ops_rows

using Five = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
using Six = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class T>
const FusedKernels<T>& fused();
template <>
const FusedKernels<float>& fused<float>() {
  return fused_kernels().f32;
}
template <>
const FusedKernels<bf16>& fused<bf16>() {
  return fused_kernels().b16;
}

template <class T>
const Fp8Casts<T>& formats(bool e5m2);
template <>
const Fp8Casts<float>& formats<float>(bool e5m2) {
  return e5m2 ? fp8_kernels().e5m2_f32 : fp8_kernels().e4m3_f32;
}
template <>
const Fp8Casts<bf16>& formats<bf16>(bool e5m2) {
  return e5m2 ? fp8_kernels().e5m2_b16 : fp8_kernels().e4m3_b16;
}

// FP8 copies of a result [rows, columns]: as it lies, and transposed where asked for (else empty).
struct Copies {
  Tensor plain, turned;
  int64_t rows, columns;
  bool e5m2;

  Copies(const Tensor& like, const std::vector<int64_t>& shape, bool wide, bool transposed)
      : plain(torch::stable::new_empty(like, shape, type(wide))),
        turned(torch::stable::new_empty(like, {0}, type(wide))),
        columns(shape.empty() ? 1 : shape.back()),
        e5m2(wide) {
    rows = plain.numel() / std::max<int64_t>(1, columns);
    if (transposed) turned = torch::stable::new_empty(like, {columns, rows}, type(wide));
    across = transposed ? out<uint8_t>(turned) : nullptr;
    bytes = out<uint8_t>(plain);
  }

  static ScalarType type(bool wide) {
    return wide ? ScalarType::Float8_e5m2 : ScalarType::Float8_e4m3fn;
  }

  // y [rows, columns], of which rows [begin, end) are there now.
  template <class T>
  void of(const T* y, int64_t begin, int64_t end) const {
    if (across != nullptr)
      formats<T>(e5m2).cast_transpose(y, bytes, across, rows, columns, begin, end);
    else
      formats<T>(e5m2).cast(y + begin * columns, bytes + begin * columns, (end - begin) * columns);
  }

  // Runs fn(begin, end) on blocks of rows.
  template <class F>
  void over(const F& fn) const {
    if (rows * columns == 0) return;
    const int64_t blocks = (rows + kCastBlock - 1) / kCastBlock;
    torch::stable::parallel_for(0, blocks, 1, [&](int64_t first, int64_t last) {
      for (int64_t block = first; block < last; ++block)
        fn(block * kCastBlock, std::min(rows, (block + 1) * kCastBlock));
    });
  }

 private:
  uint8_t *bytes, *across;
};

std::vector<int64_t> shape_of(const Tensor& x) { return {x.sizes().begin(), x.sizes().end()}; }

// The parameters of a norm and its statistics, [rows] each.
struct NormArgs {
  const Tensor &weight;
  const std::optional<Tensor>& bias;
  float eps;
  bool layer;
  Tensor mean, rstd;

  NormArgs(const Tensor& x, const Tensor& w, const std::optional<Tensor>& b, double e, bool l)
      : weight(w), bias(b), eps(static_cast<float>(e)), layer(l),
        mean(torch::stable::new_empty(x, {l ? row_count(x) : 0}, ScalarType::Float)),
        rstd(torch::stable::new_empty(x, {row_count(x)}, ScalarType::Float)) {
    check(x, x.scalar_type(), "x");
    check(w, x.scalar_type(), "weight");
    STD_TORCH_CHECK(w.numel() == x.size(-1), "weight: wrong length");
    if (b) check(*b, x.scalar_type(), "bias");
    STD_TORCH_CHECK(!b || (l && b->numel() == w.numel()), "bias: of LayerNorm only, as the weight");
  }

  template <class T>
  void run(const T* x, T* y, int64_t begin, int64_t end) const {
    const int64_t d = weight.numel();
    const T* pw = in<T>(weight);
    if (layer)
      fused<T>().layer_norm(x, pw, bias ? in<T>(*bias) : nullptr, y, out<float>(mean),
                            out<float>(rstd), d, eps, begin, end);
    else
      rows<T>().rms_norm(x, pw, y, out<float>(rstd), d, eps, begin, end);
  }
};

// total = x + branch (empty without one: x itself); y = norm(total), and y in e4m3.
Six add_norm_cast(const Tensor& x, const std::optional<Tensor>& branch, const Tensor& weight,
                  const std::optional<Tensor>& bias, double eps, bool layer, bool turned) {
  const NormArgs norm(x, weight, bias, eps, layer);
  if (branch) {
    check(*branch, x.scalar_type(), "branch");
    STD_TORCH_CHECK(branch->numel() == x.numel(), "branch: wrong shape");
  }
  const std::vector<int64_t> shape = shape_of(x), none = {0};
  Tensor total = torch::stable::new_empty(x, branch ? shape : none);
  Tensor y = torch::stable::new_empty(x, shape);
  const Copies copies(x, shape, false, turned);
  with_type(x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T *px = in<T>(x), *pb = branch ? in<T>(*branch) : nullptr;
    T *sum = out<T>(total), *py = out<T>(y);
    const int64_t d = copies.columns;
    copies.over([&](int64_t begin, int64_t end) {
      if (pb != nullptr)
        fused<T>().join(px + begin * d, pb + begin * d, sum + begin * d, 1.0f, (end - begin) * d);
      norm.run<T>(pb == nullptr ? px : sum, py, begin, end);
      copies.of<T>(py, begin, end);
    });
  });
  return {total, y, norm.mean, norm.rstd, copies.plain, copies.turned};
}

// total = stay x + norm(branch), and total in e4m3.
Five norm_join_cast(const Tensor& x, const Tensor& branch, const Tensor& weight,
                    const std::optional<Tensor>& bias, double eps, bool layer, double stay,
                    bool turned) {
  const NormArgs norm(branch, weight, bias, eps, layer);
  check(x, branch.scalar_type(), "x");
  STD_TORCH_CHECK(branch.numel() == x.numel(), "branch: wrong shape");
  Tensor total = torch::stable::empty_like(x);
  const Copies copies(x, shape_of(x), false, turned);
  with_type(x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T *px = in<T>(x), *pb = in<T>(branch);
    T* sum = out<T>(total);
    const int64_t d = copies.columns;
    copies.over([&](int64_t begin, int64_t end) {
      norm.run<T>(pb, sum, begin, end);
      fused<T>().join(px + begin * d, sum + begin * d, sum + begin * d,
                      static_cast<float>(stay), (end - begin) * d);
      copies.of<T>(sum, begin, end);
    });
  });
  return {total, norm.mean, norm.rstd, copies.plain, copies.turned};
}

Triple layer_norm_backward(const Tensor& dy, const Tensor& x, const Tensor& weight,
                           const Tensor& mean, const Tensor& rstd,
                           const std::optional<Tensor>& residual) {
  const int64_t d = x.size(-1), n = row_count(x);
  for (const Tensor* each : {&dy, &x, &weight}) check(*each, x.scalar_type(), "operand");
  check(mean, ScalarType::Float, "mean");
  check(rstd, ScalarType::Float, "rstd");
  if (residual) check(*residual, x.scalar_type(), "residual");
  STD_TORCH_CHECK(dy.numel() == x.numel() && weight.numel() == d && rstd.numel() == n &&
                      mean.numel() == n && (!residual || residual->numel() == x.numel()),
                  "wrong shapes");
  Tensor dx = torch::stable::empty_like(x);
  Tensor dweight = torch::stable::new_zeros(x, {d}, ScalarType::Float);
  Tensor dbias = torch::stable::new_zeros(x, {d}, ScalarType::Float);
  const int64_t blocks = (n + kSums - 1) / kSums;
  std::vector<float> partial(2 * blocks * d, 0.0f);
  with_type(x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* add = residual ? in<T>(*residual) : nullptr;
    torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        float* sums = partial.data() + 2 * block * d;
        fused<T>().layer_norm_backward(in<T>(dy), in<T>(x), in<T>(weight), in<float>(mean),
                                       in<float>(rstd), add, out<T>(dx), sums, sums + d, d,
                                       block * kSums, std::min(n, (block + 1) * kSums));
      }
    });
  });
  float *to_weight = out<float>(dweight), *to_bias = out<float>(dbias);
  for (int64_t block = 0; block < blocks; ++block)
    for (int64_t i = 0; i < d; ++i) {
      to_weight[i] += partial[2 * block * d + i];
      to_bias[i] += partial[(2 * block + 1) * d + i];
    }
  return {dx, dweight, dbias};
}

void check_activation(const Tensor& x, int64_t activation) {
  check(x, x.scalar_type(), "x");
  STD_TORCH_CHECK(activation >= 0 && activation < kActivations, "activation: no such number");
  STD_TORCH_CHECK(activation != kSwiglu || x.size(-1) % 2 == 0, "x: odd width");
}

// y = activation(x), and y in e4m3. SwiGLU halves the width.
Triple activation_cast(const Tensor& x, int64_t activation, bool turned) {
  check_activation(x, activation);
  std::vector<int64_t> shape = shape_of(x);
  if (activation == kSwiglu) shape.back() /= 2;
  Tensor y = torch::stable::new_empty(x, shape);
  const Copies copies(x, shape, false, turned);
  with_type(x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* px = in<T>(x);
    T* py = out<T>(y);
    const int64_t d = copies.columns;
    copies.over([&](int64_t begin, int64_t end) {
      if (activation == kSwiglu)
        rows<T>().swiglu(px, py, d, begin, end);
      else
        fused<T>().activate[activation](px + begin * d, py + begin * d, (end - begin) * d);
      copies.of<T>(py, begin, end);
    });
  });
  return {y, copies.plain, copies.turned};
}

// dx from dy, and factor dx in e5m2.
Triple activation_backward_cast(const Tensor& dy, const Tensor& x, int64_t activation,
                                double factor, bool turned) {
  check_activation(x, activation);
  check(dy, x.scalar_type(), "dy");
  STD_TORCH_CHECK(dy.numel() * (activation == kSwiglu ? 2 : 1) == x.numel(), "wrong shapes");
  Tensor dx = torch::stable::empty_like(x);
  // A product with the factor is rounded to the type of x before it is cast.
  const bool scaled = factor != 1.0;
  Tensor large = scaled ? torch::stable::empty_like(x) : dx;
  const Copies copies(x, shape_of(x), true, turned);
  with_type(x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T *pg = in<T>(dy), *px = in<T>(x);
    T *po = out<T>(dx), *pl = out<T>(large);
    const int64_t d = copies.columns;
    copies.over([&](int64_t begin, int64_t end) {
      const int64_t at = begin * d, n = (end - begin) * d;
      if (activation == kSwiglu)
        rows<T>().swiglu_backward(pg, px, po, d / 2, begin, end);
      else
        fused<T>().activate_backward[activation](pg + at, px + at, po + at, n);
      if (scaled) fused<T>().join(po + at, nullptr, pl + at, static_cast<float>(factor), n);
      copies.of<T>(pl, begin, end);
    });
  });
  return {dx, copies.plain, copies.turned};
}

STABLE_TORCH_LIBRARY_FRAGMENT(llmtrain, m) {
  m.def(
      "add_norm_cast(Tensor x, Tensor? branch, Tensor weight, Tensor? bias, float eps, "
      "bool layer, bool turned) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "norm_join_cast(Tensor x, Tensor branch, Tensor weight, Tensor? bias, float eps, "
      "bool layer, float stay, bool turned) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "layer_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor mean, Tensor rstd, "
      "Tensor? residual) -> (Tensor, Tensor, Tensor)");
  m.def("activation_cast(Tensor x, int activation, bool turned) -> (Tensor, Tensor, Tensor)");
  m.def(
      "activation_backward_cast(Tensor dy, Tensor x, int activation, float factor, bool turned) "
      "-> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(llmtrain, CPU, m) {
  m.impl("add_norm_cast", TORCH_BOX(&add_norm_cast));
  m.impl("norm_join_cast", TORCH_BOX(&norm_join_cast));
  m.impl("layer_norm_backward", TORCH_BOX(&layer_norm_backward));
  m.impl("activation_cast", TORCH_BOX(&activation_cast));
  m.impl("activation_backward_cast", TORCH_BOX(&activation_backward_cast));
}

}  // namespace llmtrain
