// The operators llmtrain::* on CPU tensors made of float32 products: these and attention.
#include "bindings.h"

namespace llmtrain {

bool has_gemm() { return gemm_kernels() != nullptr; }

Strided strided(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 2 && x.scalar_type() == ScalarType::Float, "not a float32 matrix");
  return {in<float>(x), x.stride(0), x.stride(1)};
}

void product_(Tensor result, const Tensor& a, const Tensor& b, double alpha, bool add) {
  STD_TORCH_CHECK(has_gemm(), "this processor has no AVX2");
  const Gemm job{strided(a),  strided(b),       out<float>(result), a.size(0),
                 b.size(0),   a.size(1),        result.stride(0),   static_cast<float>(alpha),
                 add};
  STD_TORCH_CHECK(result.scalar_type() == ScalarType::Float && result.dim() == 2 &&
                      (result.stride(1) == 1 || job.n == 1),
                  "out: not a float32 matrix of contiguous rows");
  STD_TORCH_CHECK(b.size(1) == job.k && result.size(0) == job.m && result.size(1) == job.n,
                  "wrong shapes");
  const GemmKernels& kernels = *gemm_kernels();
  const auto packed = uninitialised(kernels.packed(job));
  const int64_t share = kernels.block_rows(job, torch::stable::get_num_threads());
  for (int64_t part = 0; part < kernels.parts(job); ++part) {
    torch::stable::parallel_for(0, kernels.panels(job, part), 16, [&](int64_t begin, int64_t end) {
      kernels.pack(job, part, packed.get(), begin, end);
    });
    torch::stable::parallel_for(0, (job.m + share - 1) / share, 1, [&](int64_t begin, int64_t end) {
      const auto scratch = uninitialised(kernels.scratch());
      for (int64_t i = begin * share; i < std::min(job.m, end * share); i += share)
        kernels.block(job, part, packed.get(), i, std::min(job.m, i + share), scratch.get());
    });
  }
}

FloatMatrix head(const Tensor& x, int64_t b, int64_t h) {
  const Heads<float> heads(x);
  return {heads.at(b, h, 0), heads.position};
}

void check_heads(const Tensor& q, const Tensor& k, const Tensor& v,
                 const std::optional<Tensor>& first) {
  STD_TORCH_CHECK(has_gemm(), "this processor has no AVX2");
  for (const Tensor* x : {&q, &k, &v})
    STD_TORCH_CHECK(x->dim() == 4 && x->scalar_type() == ScalarType::Float,
                    "q, k, v: four dimensions of float32");
  STD_TORCH_CHECK(q.size(1) % k.size(1) == 0, "query heads are not a multiple of key heads");
  for (const Tensor* x : {&k, &v})
    STD_TORCH_CHECK(x->size(0) == q.size(0) && x->size(1) == k.size(1) &&
                        x->size(2) == q.size(2) && x->size(3) == q.size(3),
                    "k, v: wrong shape");
  if (!first) return;
  check(*first, ScalarType::Int, "first");
  STD_TORCH_CHECK(first->size(0) == q.size(0) && first->size(1) == q.size(2),
                  "first: wrong shape");
}

// One query head; `heads` is the result seen as [b, h, s, d].
FloatAttention one_head(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& heads,
                        const Tensor& lse, const std::optional<Tensor>& first, double scale,
                        int64_t b, int64_t h) {
  const int64_t s = q.size(2), shared = h / (q.size(1) / k.size(1));
  return {s,
          q.size(3),
          static_cast<float>(scale),
          first ? in<int32_t>(*first) + b * s : nullptr,
          head(q, b, h),
          head(k, b, shared),
          head(v, b, shared),
          head(heads, b, h),
          const_cast<float*>(in<float>(lse)) + (b * q.size(1) + h) * s};
}

Pair attention_f32(const Tensor& q, const Tensor& k, const Tensor& v,
                   const std::optional<Tensor>& first, double scale) {
  check_heads(q, k, v, first);
  const int64_t b = q.size(0), h = q.size(1), s = q.size(2), d = q.size(3);
  Tensor result = torch::stable::new_empty(q, {b, s, h, d});
  Tensor lse = torch::stable::new_empty(q, {b, h, s});
  const Tensor heads = torch::stable::transpose(result, 1, 2);
  const FloatAttentionKernels& kernels = *float_attention_kernels();
  torch::stable::parallel_for(0, b * h, 1, [&](int64_t begin, int64_t end) {
    const auto scratch = uninitialised(kernels.scratch(s, d));
    for (int64_t i = begin; i < end; ++i)
      kernels.forward(one_head(q, k, v, heads, lse, first, scale, i / h, i % h), scratch.get());
  });
  return {result, lse};
}

Triple attention_f32_backward(const Tensor& dout, const Tensor& q, const Tensor& k,
                              const Tensor& v, const Tensor& result, const Tensor& lse,
                              const std::optional<Tensor>& first, double scale) {
  check_heads(q, k, v, first);
  check(lse, ScalarType::Float, "lse");
  const int64_t b = q.size(0), h = q.size(1), s = q.size(2), d = q.size(3), g = k.size(1);
  for (const Tensor* x : {&dout, &result})
    STD_TORCH_CHECK(x->dim() == 4 && x->scalar_type() == ScalarType::Float && x->size(0) == b &&
                        x->size(1) == s && x->size(2) == h && x->size(3) == d,
                    "dout, out: wrong shape or dtype");
  Tensor dq = torch::stable::new_empty(q, {b, h, s, d});
  Tensor dk = torch::stable::new_zeros(q, {b, g, s, d});
  Tensor dv = torch::stable::new_zeros(q, {b, g, s, d});
  const Tensor heads = torch::stable::transpose(result, 1, 2);
  const Tensor dheads = torch::stable::transpose(dout, 1, 2);
  const FloatAttentionKernels& kernels = *float_attention_kernels();
  // The query heads of a key head add to the same gradients, so one thread has them all.
  torch::stable::parallel_for(0, b * g, 1, [&](int64_t begin, int64_t end) {
    const auto scratch = uninitialised(kernels.scratch(s, d));
    for (int64_t i = begin * (h / g); i < end * (h / g); ++i) {
      const int64_t at = i / h, own = i % h, shared = own / (h / g);
      kernels.backward(
          one_head(q, k, v, heads, lse, first, scale, at, own),
          {head(dheads, at, own), head(dq, at, own), head(dk, at, shared), head(dv, at, shared)},
          scratch.get());
    }
  });
  return {dq, dk, dv};
}

STABLE_TORCH_LIBRARY_FRAGMENT(llmtrain, m) {
  m.def("has_gemm() -> bool");
  m.def("product_(Tensor(a!) out, Tensor a, Tensor b, float alpha, bool add) -> ()");
  m.def(
      "attention_f32(Tensor q, Tensor k, Tensor v, Tensor? first, float scale) -> "
      "(Tensor, Tensor)");
  m.def(
      "attention_f32_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor result, Tensor "
      "lse, Tensor? first, float scale) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(llmtrain, CompositeExplicitAutograd, m) {
  m.impl("has_gemm", TORCH_BOX(&has_gemm));
}

STABLE_TORCH_LIBRARY_IMPL(llmtrain, CPU, m) {
  m.impl("product_", TORCH_BOX(&product_));
  m.impl("attention_f32", TORCH_BOX(&attention_f32));
  m.impl("attention_f32_backward", TORCH_BOX(&attention_f32_backward));
}

}  // namespace llmtrain
