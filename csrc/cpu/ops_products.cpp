// The operators llmtrain::* on CPU tensors made of bfloat16 products: attention and weight
// gradients.
#include <string>

#include "bindings.h"

namespace llmtrain {

std::string kernel_set_name() { return kernel_set(); }

std::string sources_stamp() { return sources(); }

bool has_attention() { return attention_kernels() != nullptr; }

bool has_products() { return product_kernels() != nullptr; }

void weight_gradient_(Tensor result, const Tensor& grad, const Tensor& x, bool add) {
  STD_TORCH_CHECK(has_products(), "this processor has no AMX");
  check(grad, ScalarType::BFloat16, "grad");
  check(x, ScalarType::BFloat16, "x");
  check(result, ScalarType::Float, "out");
  const int64_t n = x.size(0), rows = grad.size(1), columns = x.size(1);
  STD_TORCH_CHECK(grad.size(0) == n && result.size(0) == rows && result.size(1) == columns,
                  "wrong shapes");
  const ProductKernels& kernels = *product_kernels();
  const int64_t share = kernels.block_rows(rows, torch::stable::get_num_threads());
  const WeightGradient job{in<bf16>(grad), in<bf16>(x), out<float>(result),
                           n,              rows,        columns,
                           share,          add};
  Tensor packed =
      torch::stable::new_empty(x, {kernels.packed_words(n, columns)}, ScalarType::Int);
  auto* words = reinterpret_cast<uint32_t*>(out<int32_t>(packed));
  torch::stable::parallel_for(0, (n + 31) / 32, 8, [&](int64_t begin, int64_t end) {
    kernels.pack(job.x, n, columns, words, begin, end);
  });
  torch::stable::parallel_for(0, kernels.blocks(job), 1, [&](int64_t begin, int64_t end) {
    const auto scratch = uninitialised(kernels.scratch());
    for (int64_t i = begin; i < end; ++i) kernels.block(job, words, i, scratch.get());
  });
}

Matrix matrix(const Tensor& x, int64_t b, int64_t head) {
  const Heads<bf16> heads(x);
  return {heads.at(b, head, 0), heads.position, heads.head};
}

// Checks shapes and types and returns the shape of one key/value head.
AttentionShape attention_shape(const Tensor& q, const Tensor& k, const Tensor& v,
                               const std::optional<Tensor>& first, double scale) {
  STD_TORCH_CHECK(has_attention(), "this processor has no bfloat16 products");
  for (const Tensor* x : {&q, &k, &v})
    STD_TORCH_CHECK(x->dim() == 4 && x->scalar_type() == ScalarType::BFloat16,
                    "q, k, v: four dimensions of bfloat16");
  const int64_t b = q.size(0), s = q.size(2), d = q.size(3), g = k.size(1);
  STD_TORCH_CHECK(d % 32 == 0, "the width of a head is not a multiple of 32");
  STD_TORCH_CHECK(q.size(1) % g == 0, "query heads are not a multiple of key heads");
  for (const Tensor* x : {&k, &v})
    STD_TORCH_CHECK(x->size(0) == b && x->size(1) == g && x->size(2) == s && x->size(3) == d,
                    "k, v: wrong shape");
  if (first) {
    check(*first, ScalarType::Int, "first");
    STD_TORCH_CHECK(first->size(0) == b && first->size(1) == s, "first: wrong shape");
  }
  return {s, d, q.size(1) / g, static_cast<float>(scale), nullptr};
}

// Calls fn(sequence, key/value head, shape, scratch) for all of them.
template <class F>
void each_head(AttentionShape shape, int64_t batch, int64_t groups, int64_t scratch,
               const std::optional<Tensor>& first, const F& fn) {
  const int32_t* starts = first ? in<int32_t>(*first) : nullptr;
  torch::stable::parallel_for(0, batch * groups, 1, [&](int64_t begin, int64_t end) {
    const auto memory = uninitialised(scratch);
    AttentionShape own = shape;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / groups;
      if (starts != nullptr) own.first = starts + b * shape.s;
      fn(b, i % groups, own, memory.get());
    }
  });
}

Pair attention(const Tensor& q, const Tensor& k, const Tensor& v,
               const std::optional<Tensor>& first, double scale) {
  const AttentionShape shape = attention_shape(q, k, v, first, scale);
  const int64_t b = q.size(0), h = q.size(1), s = shape.s, r = shape.group;
  Tensor result = torch::stable::new_empty(q, {b, s, h, shape.d});
  Tensor lse = torch::stable::new_empty(q, {b, h, s}, ScalarType::Float);
  const Tensor heads = torch::stable::transpose(result, 1, 2);
  float* sums = out<float>(lse);
  const AttentionKernels& kernels = *attention_kernels();
  each_head(shape, b, h / r, kernels.forward_scratch(s, shape.d), first,
            [&](int64_t i, int64_t g, const AttentionShape& own, float* scratch) {
              kernels.forward(own, matrix(q, i, g * r), matrix(k, i, g), matrix(v, i, g),
                              matrix(heads, i, g * r), sums + (i * h + g * r) * s, scratch);
            });
  return {result, lse};
}

Triple attention_backward(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v,
                          const Tensor& result, const Tensor& lse,
                          const std::optional<Tensor>& first, double scale) {
  const AttentionShape shape = attention_shape(q, k, v, first, scale);
  const int64_t b = q.size(0), h = q.size(1), s = shape.s, d = shape.d, r = shape.group;
  check(lse, ScalarType::Float, "lse");
  for (const Tensor* x : {&dout, &result})
    STD_TORCH_CHECK(x->dim() == 4 && x->scalar_type() == ScalarType::BFloat16 &&
                        x->size(0) == b && x->size(1) == s && x->size(2) == h && x->size(3) == d,
                    "dout, out: wrong shape or dtype");
  Tensor dq = torch::stable::new_empty(q, {b, h, s, d});
  Tensor dk = torch::stable::new_empty(k, {b, h / r, s, d});
  Tensor dv = torch::stable::new_empty(v, {b, h / r, s, d});
  const Tensor heads = torch::stable::transpose(result, 1, 2);
  const Tensor dheads = torch::stable::transpose(dout, 1, 2);
  const float* sums = in<float>(lse);
  const AttentionKernels& kernels = *attention_kernels();
  each_head(shape, b, h / r, kernels.backward_scratch(s, d), first,
            [&](int64_t i, int64_t g, const AttentionShape& own, float* scratch) {
              kernels.backward(own, matrix(q, i, g * r), matrix(k, i, g), matrix(v, i, g),
                               matrix(heads, i, g * r), sums + (i * h + g * r) * s,
                               matrix(dheads, i, g * r), matrix(dq, i, g * r), matrix(dk, i, g),
                               matrix(dv, i, g), scratch);
            });
  return {dq, dk, dv};
}

STABLE_TORCH_LIBRARY_FRAGMENT(llmtrain, m) {
  m.def("kernel_set() -> str");
  m.def("sources() -> str");
  m.def("has_attention() -> bool");
  m.def("has_products() -> bool");
  m.def("weight_gradient_(Tensor(a!) out, Tensor grad, Tensor x, bool add) -> ()");
  m.def(
      "attention(Tensor q, Tensor k, Tensor v, Tensor? first, float scale) -> (Tensor, Tensor)");
  m.def(
      "attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor result, Tensor lse, "
      "Tensor? first, float scale) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(llmtrain, CompositeExplicitAutograd, m) {
  m.impl("kernel_set", TORCH_BOX(&kernel_set_name));
  m.impl("sources", TORCH_BOX(&sources_stamp));
  m.impl("has_attention", TORCH_BOX(&has_attention));
  m.impl("has_products", TORCH_BOX(&has_products));
}

STABLE_TORCH_LIBRARY_IMPL(llmtrain, CPU, m) {
  m.impl("weight_gradient_", TORCH_BOX(&weight_gradient_));
  m.impl("attention", TORCH_BOX(&attention));
  m.impl("attention_backward", TORCH_BOX(&attention_backward));
}

}  // namespace llmtrain
