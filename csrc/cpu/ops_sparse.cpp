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

template <class T, class K>
void product(const SparseSide& side, const Tensor& x, const Tensor& y, const K& kernels) {
  const int64_t tokens = x.size(0);
  const int64_t width = kernels.panel(side.height), panels = (tokens + width - 1) / width;
  const int64_t share = panels / torch::stable::get_num_threads();
  constexpr int64_t kGroup = 96;  // tokens between two readings of the values
  const int64_t group =
      std::max<int64_t>(1, std::min<int64_t>((kGroup + width - 1) / width, share));
  const SparseProduct<T> job{side, in<T>(x), out<T>(y), tokens, x.size(1), group};
  const int64_t groups = (panels + group - 1) / group;
  torch::stable::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
    const auto scratch = uninitialised(kernels.scratch(job));
    for (int64_t i = begin; i < end; ++i) kernels.group(job, i, scratch.get());
  });
}

// The values of a side rounded to bfloat16, two columns to a word. They are packed for each
// product, which costs what reading and writing them costs; copies that stay would have to follow
// whoever writes the values.
struct Words {
  std::vector<int32_t> starts;
  std::unique_ptr<int32_t[]> columns_of;
  std::unique_ptr<uint32_t[]> words;
  SparseSide side;

  Words(const SparseSide& from, int64_t tiles, const SparsePairs& kernels) : side(from) {
    const int64_t runs = from.chunks() * from.bands();
    side.columns = (from.columns + 1) / 2;
    side.chunk = from.chunk / 2;
    if (from.width == 1) {
      starts.resize(runs + 1);
      torch::stable::parallel_for(0, runs, kGrain, [&](int64_t begin, int64_t end) {
        kernels.count(from, starts.data() + 1, begin, end);
      });
      for (int64_t run = 0; run < runs; ++run) starts[run + 1] += starts[run];
      side.starts = starts.data();
      tiles = starts[runs];
    } else {
      side.width = from.width / 2;
    }
    columns_of = std::make_unique_for_overwrite<int32_t[]>(tiles);
    words = std::make_unique_for_overwrite<uint32_t[]>(tiles * side.width * side.height);
    const SparseWords packed{side.starts, columns_of.get(), words.get()};
    torch::stable::parallel_for(0, runs, kGrain, [&](int64_t begin, int64_t end) {
      kernels.pack(from, packed, begin, end);
    });
    side.columns_of = columns_of.get();
    side.values = reinterpret_cast<const float*>(words.get());
  }
};

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
  const SparsePairs* pairs = sparse_pairs();
  if (pairs != nullptr && s.chunk % 4 == 0 && x.scalar_type() == ScalarType::BFloat16) {
    const Words words(side, columns_of.numel(), *pairs);
    product<bf16>(words.side, x, y, *pairs);
    return y;
  }
  with_type(x, [&](auto* type) {
    product<std::remove_pointer_t<decltype(type)>>(side, x, y, kernels_for(type));
  });
  return y;
}

namespace {

// x [tokens, columns] in chunks of kTokens, turned: [chunks, columns rounded up, kTokens].
template <class T, class A, class F>
std::unique_ptr<T[]> turned(const Tensor& x, int64_t multiple, const F& turn) {
  const int64_t tokens = x.size(0), columns = x.size(1);
  const int64_t chunks = (tokens + kTokens - 1) / kTokens;
  auto memory = std::make_unique_for_overwrite<T[]>(
      chunks * kTokens * ((columns + multiple - 1) / multiple * multiple));
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      turn(in<A>(x), tokens, columns, multiple, memory.get(), i);
  });
  return memory;
}

// T: what the kernels multiply; A: what dy and x hold.
template <class T, class A, class F, class G>
void gradient(const SparseSide& side, const Tensor& dy, const Tensor& x, const Tensor& grad,
              const F& turn, const G& kernel) {
  const auto dy_turned = turned<T, A>(dy, side.height, turn);
  const auto x_turned = turned<T, A>(x, side.width, turn);
  const SparseGradient<T> job{side, dy_turned.get(), x_turned.get(), out<float>(grad), x.size(0)};
  // Bands of a part share the columns of x in the second cache.
  constexpr int64_t kPart = 256;
  const int64_t rows = (side.bands() + kPart - 1) / kPart;
  torch::stable::parallel_for(0, side.chunks() * rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % rows * kPart;
      kernel(job, i / rows, first, std::min(side.bands(), first + kPart));
    }
  });
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
  const SparsePairs* pairs = sparse_pairs();
  if (pairs != nullptr && x.scalar_type() == ScalarType::BFloat16) {
    gradient<bf16, bf16>(side, dy, x, grad, pairs->turn, pairs->gradient);
    return grad;
  }
  with_type(x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    gradient<float, T>(side, dy, x, grad, kernels_for(type).turn, sparse_kernels().gradient);
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
