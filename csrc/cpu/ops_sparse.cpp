// The operators llmtrain::sparse_* on CPU tensors, through torch's stable ABI (torch >= 2.11).
#include "bindings.h"

namespace llmtrain {

namespace {

struct Shape {
  int64_t rows, columns, height, width, chunk;
};

Shape shape_of(torch::headeronly::IntHeaderOnlyArrayRef sizes) {
  STD_TORCH_CHECK(sizes.size() == 5, "layout: rows, columns, height, width, chunk");
  const Shape s{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]};
  for (const int64_t edge : {s.height, s.width})
    STD_TORCH_CHECK(edge == 1 || edge == 2 || edge == 4, "tiles of 1, 2 or 4 rows and columns only");
  STD_TORCH_CHECK(s.chunk > 0 && s.chunk % s.width == 0, "chunk: not a multiple of the width");
  return s;
}

// The runs and the places of their tiles were made by llmtrain/ops/sparse.py; what is checked here
// is that no kernel reads past the end of a tensor.
SparseSide side_of(const Shape& s, const Tensor& starts, const Tensor& columns_of,
                   const Tensor* values) {
  SparseSide side{in<int32_t>(starts), in<int32_t>(columns_of), nullptr, s.rows, s.columns,
                  s.height,            s.width,                 s.chunk};
  check(starts, ScalarType::Int, "starts");
  check(columns_of, ScalarType::Int, "columns_of");
  STD_TORCH_CHECK(starts.numel() == side.chunks() * side.bands() + 1, "starts: wrong length");
  const int64_t tiles = columns_of.numel();
  STD_TORCH_CHECK(side.starts[starts.numel() - 1] == tiles, "starts: not of these tiles");
  if (values != nullptr) {
    check(*values, ScalarType::Float, "values");
    STD_TORCH_CHECK(values->numel() == tiles * s.height * s.width, "values: wrong length");
    side.values = in<float>(*values);
  }
  return side;
}

const SparseKernels<float>& kernels_for(float*) { return sparse_kernels().f32; }
const SparseKernels<bf16>& kernels_for(bf16*) { return sparse_kernels().b16; }

// Runs that are worth a thread.
constexpr int64_t kGrain = 64;

}  // namespace

Tensor sparse_product(const Tensor& x, const Tensor& starts, const Tensor& columns_of,
                      const Tensor& values, torch::headeronly::IntHeaderOnlyArrayRef layout) {
  const Shape s = shape_of(layout);
  check(x, x.scalar_type(), "x");
  STD_TORCH_CHECK(x.dim() == 2 && x.size(1) == s.columns, "x: wrong shape");
  const SparseSide side = side_of(s, starts, columns_of, &values);
  const int64_t tokens = x.size(0);
  if (s.columns == 0) return torch::stable::new_zeros(x, {tokens, s.rows});
  Tensor y = torch::stable::new_empty(x, {tokens, s.rows});
  if (y.numel() == 0) return y;
  with_type(x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const SparseKernels<T>& kernels = kernels_for(type);
    const int64_t width = kernels.panel(s.height), panels = (tokens + width - 1) / width;
    const int64_t share = panels / torch::stable::get_num_threads();
    constexpr int64_t kGroup = 96;  // tokens between two readings of the values
    const int64_t group =
        std::max<int64_t>(1, std::min<int64_t>((kGroup + width - 1) / width, share));
    const SparseProduct<T> job{side, in<T>(x), out<T>(y), tokens, group};
    const int64_t groups = (panels + group - 1) / group;
    torch::stable::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
      const auto scratch = uninitialised(kernels.scratch(job));
      for (int64_t i = begin; i < end; ++i) kernels.group(job, i, scratch.get());
    });
  });
  return y;
}

namespace {

// x [tokens, columns] in chunks of kTokens, turned: [chunks, columns rounded up, kTokens].
std::unique_ptr<float[]> turned(const Tensor& x, int64_t multiple) {
  const int64_t tokens = x.size(0), columns = x.size(1);
  const int64_t chunks = (tokens + kTokens - 1) / kTokens;
  auto memory = uninitialised(chunks * kTokens * ((columns + multiple - 1) / multiple * multiple));
  with_type(x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        kernels_for(type).turn(in<T>(x), tokens, columns, multiple, memory.get(), i);
    });
  });
  return memory;
}

}  // namespace

Tensor sparse_gradient(const Tensor& dy, const Tensor& x, const Tensor& starts,
                       const Tensor& columns_of,
                       torch::headeronly::IntHeaderOnlyArrayRef layout) {
  const Shape s = shape_of(layout);
  check(dy, x.scalar_type(), "dy");
  check(x, x.scalar_type(), "x");
  STD_TORCH_CHECK(x.dim() == 2 && x.size(1) == s.columns, "x: wrong shape");
  STD_TORCH_CHECK(dy.dim() == 2 && dy.size(0) == x.size(0) && dy.size(1) == s.rows,
                  "dy: wrong shape");
  const SparseSide side = side_of(s, starts, columns_of, nullptr);
  Tensor grad = torch::stable::new_empty(x, {columns_of.numel(), s.width, s.height},
                                         ScalarType::Float);
  if (grad.numel() == 0) return grad;
  const auto dy_turned = turned(dy, s.height), x_turned = turned(x, s.width);
  const SparseGradient job{side, dy_turned.get(), x_turned.get(), out<float>(grad), x.size(0)};
  // Bands of a part share the columns of x in the second cache.
  constexpr int64_t kPart = 256;
  const int64_t rows = (side.bands() + kPart - 1) / kPart;
  torch::stable::parallel_for(0, side.chunks() * rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % rows * kPart;
      sparse_kernels().gradient(job, i / rows, first, std::min(side.bands(), first + kPart));
    }
  });
  return grad;
}

namespace {

SparseCopies copies_of(const Shape& s, const Tensor& starts, const Tensor& columns_of,
                       const Tensor& place, const Tensor& values, const Tensor& turned) {
  const SparseSide side = side_of(s, starts, columns_of, &values);
  check(place, ScalarType::Int, "place");
  check(turned, ScalarType::Float, "turned");
  STD_TORCH_CHECK(place.numel() == columns_of.numel() && turned.numel() == values.numel(),
                  "place, turned: wrong length");
  return {side, in<int32_t>(place), out<float>(values), out<float>(turned)};
}

float* dense(const Shape& s, const Tensor& weight) {
  check(weight, ScalarType::Float, "weight");
  STD_TORCH_CHECK(weight.dim() == 2 && weight.size(0) == s.rows && weight.size(1) == s.columns,
                  "weight: wrong shape");
  return out<float>(weight);
}

}  // namespace

void sparse_repack_(Tensor values, Tensor turned, const Tensor& weight, const Tensor& starts,
                    const Tensor& columns_of, const Tensor& place,
                    torch::headeronly::IntHeaderOnlyArrayRef layout) {
  const Shape s = shape_of(layout);
  const SparseCopies job = copies_of(s, starts, columns_of, place, values, turned);
  const float* from = dense(s, weight);
  torch::stable::parallel_for(0, starts.numel() - 1, kGrain, [&](int64_t begin, int64_t end) {
    sparse_kernels().repack(job, from, begin, end);
  });
}

// second: the second moment, for AdamW; without it Lion. weight: a dense copy that follows.
// factors: decay, beta1, beta2, rate, eps, root as in SparseUpdate.
void sparse_update_(Tensor values, Tensor turned, const std::optional<Tensor>& weight,
                    const Tensor& grad, Tensor first, const std::optional<Tensor>& second,
                    const Tensor& starts, const Tensor& columns_of, const Tensor& place,
                    torch::headeronly::IntHeaderOnlyArrayRef layout, double decay, double beta1,
                    double beta2, double rate, double eps, double root) {
  const Shape s = shape_of(layout);
  const SparseCopies copies = copies_of(s, starts, columns_of, place, values, turned);
  check(grad, ScalarType::Float, "grad");
  check(first, ScalarType::Float, "first");
  STD_TORCH_CHECK(grad.numel() == values.numel() && first.numel() == values.numel(),
                  "grad, moments: wrong length");
  if (second) {
    check(*second, ScalarType::Float, "second");
    STD_TORCH_CHECK(second->numel() == values.numel(), "grad, moments: wrong length");
  }
  const auto f = [](double x) { return static_cast<float>(x); };
  const SparseUpdate job{copies,
                         in<float>(grad),
                         out<float>(first),
                         second ? out<float>(*second) : nullptr,
                         weight ? dense(s, *weight) : nullptr,
                         f(decay),
                         f(beta1),
                         f(beta2),
                         f(rate),
                         f(eps),
                         f(root)};
  const auto step = second ? sparse_kernels().adamw : sparse_kernels().lion;
  torch::stable::parallel_for(0, starts.numel() - 1, kGrain,
                              [&](int64_t begin, int64_t end) { step(job, begin, end); });
}

STABLE_TORCH_LIBRARY_FRAGMENT(llmtrain, m) {
  m.def(
      "sparse_product(Tensor x, Tensor starts, Tensor columns_of, Tensor values, int[] layout) -> "
      "Tensor");
  m.def(
      "sparse_gradient(Tensor dy, Tensor x, Tensor starts, Tensor columns_of, int[] layout) -> "
      "Tensor");
  m.def(
      "sparse_repack_(Tensor(a!) values, Tensor(b!) turned, Tensor weight, Tensor starts, Tensor "
      "columns_of, Tensor place, int[] layout) -> ()");
  m.def(
      "sparse_update_(Tensor(a!) values, Tensor(b!) turned, Tensor(c!)? weight, Tensor grad, "
      "Tensor(d!) first, Tensor(e!)? second, Tensor starts, Tensor columns_of, Tensor place, "
      "int[] layout, float decay, float beta1, float beta2, float rate, float eps, float root) -> "
      "()");
}

STABLE_TORCH_LIBRARY_IMPL(llmtrain, CPU, m) {
  m.impl("sparse_product", TORCH_BOX(&sparse_product));
  m.impl("sparse_gradient", TORCH_BOX(&sparse_gradient));
  m.impl("sparse_repack_", TORCH_BOX(&sparse_repack_));
  m.impl("sparse_update_", TORCH_BOX(&sparse_update_));
}

}  // namespace llmtrain
