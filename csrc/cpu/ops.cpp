// The operators llmtrain::* on CPU tensors, through torch's stable ABI (torch >= 2.11).
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "attention.h"
#include "products.h"
#include "rows.h"

#ifdef __x86_64__
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace avx512 {
extern const llmtrain::KernelSet kernels;
}
namespace avx2 {
extern const llmtrain::KernelSet kernels;
}
namespace amx {
extern const llmtrain::AttentionKernels attention;
extern const llmtrain::ProductKernels products;
}
namespace avx512bf16 {
extern const llmtrain::AttentionKernels attention;
}
#endif
namespace baseline {
extern const llmtrain::KernelSet kernels;
}

namespace llmtrain {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Pair = std::tuple<Tensor, Tensor>;
using Triple = std::tuple<Tensor, Tensor, Tensor>;

// Rows of a norm's weight gradient that are summed by one thread. Fixed, so that the result does
// not depend on the number of threads.
constexpr int64_t kNormBlock = 128;

// What the kernels may use, best first. LLMTRAIN_CPU_KERNELS names the best one to use, to
// compare the others with it.
enum Level { kAmx, kAvx512Bf16, kAvx512, kAvx2, kBaseline };
constexpr const char* kLevelNames[] = {"amx", "avx512_bf16", "avx512", "avx2", "baseline"};

#ifdef __x86_64__
// Whether the processor has AMX for bfloat16 and Linux lets this process use it.
bool amx_granted() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  if (!(d >> 22 & 1u) || !(d >> 24 & 1u)) return false;
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // arch_prctl
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

Level best_level() {
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return kBaseline;
  if (!__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512vl") ||
      !__builtin_cpu_supports("avx512dq"))
    return kAvx2;
  if (!__builtin_cpu_supports("avx512bf16")) return kAvx512;
  return amx_granted() ? kAmx : kAvx512Bf16;
}
#else
Level best_level() { return kBaseline; }
#endif

Level level() {
  static const Level chosen = [] {
    const Level best = best_level();
    const char* asked = std::getenv("LLMTRAIN_CPU_KERNELS");
    if (asked == nullptr) return best;
    for (int i = best; i <= kBaseline; ++i)
      if (std::strcmp(asked, kLevelNames[i]) == 0) return static_cast<Level>(i);
    return best;
  }();
  return chosen;
}

std::string kernel_set() { return kLevelNames[level()]; }

const KernelSet& best_kernels() {
#ifdef __x86_64__
  if (level() <= kAvx512) return avx512::kernels;
  if (level() == kAvx2) return avx2::kernels;
#endif
  return baseline::kernels;
}

// Null where the processor has no bfloat16 products.
const AttentionKernels* attention_kernels() {
#ifdef __x86_64__
  if (level() == kAmx) return &amx::attention;
  if (level() == kAvx512Bf16) return &avx512bf16::attention;
#endif
  return nullptr;
}

bool has_attention() { return attention_kernels() != nullptr; }

template <class T>
const RowKernels<T>& rows();
template <>
const RowKernels<float>& rows<float>() {
  return best_kernels().f32;
}
template <>
const RowKernels<bf16>& rows<bf16>() {
  return best_kernels().b16;
}

template <class T>
const T* in(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}

template <class T>
T* out(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

void check(const Tensor& x, ScalarType dtype, const char* name) {
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

std::unique_ptr<float[]> uninitialised(int64_t n) {
  return std::make_unique_for_overwrite<float[]>(n);
}

int64_t row_count(const Tensor& x) { return x.numel() / std::max<int64_t>(1, x.size(-1)); }

Pair rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  const int64_t d = x.size(-1), n = row_count(x);
  check(x, x.scalar_type(), "x");
  check(weight, x.scalar_type(), "weight");
  STD_TORCH_CHECK(weight.numel() == d, "weight: wrong length");
  Tensor y = torch::stable::empty_like(x);
  Tensor rstd = torch::stable::new_empty(x, {n}, ScalarType::Float);
  with_type(x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T *px = in<T>(x), *pw = in<T>(weight);
    T* py = out<T>(y);
    float* ps = out<float>(rstd);
    torch::stable::parallel_for(0, n, 64, [&](int64_t begin, int64_t end) {
      rows<T>().rms_norm(px, pw, py, ps, d, static_cast<float>(eps), begin, end);
    });
  });
  return {y, rstd};
}

Triple add_rms_norm(const Tensor& x, const Tensor& branch, const Tensor& weight, double eps) {
  const int64_t d = x.size(-1), n = row_count(x);
  check(x, x.scalar_type(), "x");
  check(branch, x.scalar_type(), "branch");
  check(weight, x.scalar_type(), "weight");
  STD_TORCH_CHECK(weight.numel() == d && branch.numel() == x.numel(), "wrong shapes");
  Tensor sum = torch::stable::empty_like(x), y = torch::stable::empty_like(x);
  Tensor rstd = torch::stable::new_empty(x, {n}, ScalarType::Float);
  with_type(x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T *px = in<T>(x), *pb = in<T>(branch), *pw = in<T>(weight);
    T *psum = out<T>(sum), *py = out<T>(y);
    float* ps = out<float>(rstd);
    torch::stable::parallel_for(0, n, 64, [&](int64_t begin, int64_t end) {
      rows<T>().add_rms_norm(px, pb, pw, psum, py, ps, d, static_cast<float>(eps), begin, end);
    });
  });
  return {sum, y, rstd};
}

Pair rms_norm_backward(const Tensor& dy, const Tensor& x, const Tensor& weight,
                       const Tensor& rstd, const std::optional<Tensor>& residual) {
  const int64_t d = x.size(-1), n = row_count(x);
  check(dy, x.scalar_type(), "dy");
  check(x, x.scalar_type(), "x");
  check(weight, x.scalar_type(), "weight");
  check(rstd, ScalarType::Float, "rstd");
  if (residual) check(*residual, x.scalar_type(), "residual");
  STD_TORCH_CHECK(dy.numel() == x.numel() && weight.numel() == d && rstd.numel() == n,
                  "wrong shapes");
  Tensor dx = torch::stable::empty_like(x);
  Tensor dweight = torch::stable::new_zeros(x, {d}, ScalarType::Float);
  const int64_t blocks = (n + kNormBlock - 1) / kNormBlock;
  std::vector<float> partial(blocks * d, 0.0f);
  with_type(x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T *pg = in<T>(dy), *px = in<T>(x), *pw = in<T>(weight);
    const T* add = residual ? in<T>(*residual) : nullptr;
    const float* ps = in<float>(rstd);
    T* po = out<T>(dx);
    torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block)
        rows<T>().rms_norm_backward(pg, px, pw, ps, add, po, partial.data() + block * d, d,
                                    block * kNormBlock, std::min(n, (block + 1) * kNormBlock));
    });
  });
  float* total = out<float>(dweight);
  for (int64_t block = 0; block < blocks; ++block)
    for (int64_t i = 0; i < d; ++i) total[i] += partial[block * d + i];
  return {dx, dweight};
}

Tensor swiglu(const Tensor& x) {
  const int64_t f = x.size(-1) / 2, n = row_count(x);
  check(x, x.scalar_type(), "x");
  STD_TORCH_CHECK(x.size(-1) % 2 == 0, "x: odd width");
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = f;
  Tensor y = torch::stable::new_empty(x, shape);
  with_type(x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* px = in<T>(x);
    T* py = out<T>(y);
    torch::stable::parallel_for(0, n, 16, [&](int64_t begin, int64_t end) {
      rows<T>().swiglu(px, py, f, begin, end);
    });
  });
  return y;
}

Tensor swiglu_backward(const Tensor& dy, const Tensor& x) {
  const int64_t f = x.size(-1) / 2, n = row_count(x);
  check(x, x.scalar_type(), "x");
  check(dy, x.scalar_type(), "dy");
  STD_TORCH_CHECK(2 * dy.numel() == x.numel(), "wrong shapes");
  Tensor dx = torch::stable::empty_like(x);
  with_type(x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T *pg = in<T>(dy), *px = in<T>(x);
    T* po = out<T>(dx);
    torch::stable::parallel_for(0, n, 16, [&](int64_t begin, int64_t end) {
      rows<T>().swiglu_backward(pg, px, po, f, begin, end);
    });
  });
  return dx;
}

Triple cross_entropy_(Tensor logits, const Tensor& targets, const Tensor& weights, int64_t vocab,
                      double z_loss, double smoothing, bool grad) {
  const int64_t n = row_count(logits);
  check(logits, logits.scalar_type(), "logits");
  check(targets, ScalarType::Long, "targets");
  check(weights, ScalarType::Float, "weights");
  STD_TORCH_CHECK(targets.numel() == n && weights.numel() == n, "wrong shapes");
  const int64_t* pt = in<int64_t>(targets);
  for (int64_t i = 0; i < n; ++i)
    STD_TORCH_CHECK(pt[i] >= 0 && pt[i] < vocab, "target outside the vocabulary");
  const CrossEntropy terms{vocab, logits.size(-1), static_cast<float>(z_loss),
                           static_cast<float>(smoothing), grad};
  STD_TORCH_CHECK(vocab > 0 && vocab <= terms.padded, "vocab: more than the logits have");
  auto row = [&] { return torch::stable::new_empty(logits, {n}, ScalarType::Float); };
  Tensor nll = row(), loss = row(), z = row();
  with_type(logits, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    T* px = out<T>(logits);
    const float* pw = in<float>(weights);
    float *pn = out<float>(nll), *pl = out<float>(loss), *pz = out<float>(z);
    torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
      const auto scratch = uninitialised(vocab);
      rows<T>().cross_entropy(px, pt, pw, pn, pl, pz, scratch.get(), terms, begin, end);
    });
  });
  return {nll, loss, z};
}

// A head-major tensor [b, heads, s, d] with its strides, d contiguous.
template <class T>
struct Heads {
  T* data;
  int64_t batch, head, position;

  explicit Heads(const Tensor& x)
      : data(const_cast<T*>(in<T>(x))), batch(x.stride(0)), head(x.stride(1)),
        position(x.stride(2)) {
    STD_TORCH_CHECK(x.dim() == 4 && x.stride(3) == 1, "heads must be contiguous");
  }

  T* at(int64_t b, int64_t h, int64_t s) const {
    return data + b * batch + h * head + s * position;
  }
};

// cos and sin [1 or b, s, d/2] float32.
struct Angles {
  const float *cos, *sin;
  int64_t batch, half;

  Angles(const Tensor& c, const Tensor& s) : cos(in<float>(c)), sin(in<float>(s)) {
    check(c, ScalarType::Float, "cos");
    check(s, ScalarType::Float, "sin");
    half = c.size(2);
    batch = c.size(0) == 1 ? 0 : c.size(1) * half;
  }
};

Triple rotary_split(const Tensor& qkv, const Tensor& cos, const Tensor& sin) {
  STD_TORCH_CHECK(qkv.dim() == 5, "qkv: five dimensions");
  check(qkv, qkv.scalar_type(), "qkv");
  const int64_t b = qkv.size(0), s = qkv.size(1), g = qkv.size(2), r = qkv.size(3) - 2;
  const int64_t d = qkv.size(4);
  const Angles angles(cos, sin);
  STD_TORCH_CHECK(cos.size(1) == s && 2 * angles.half == d, "cos, sin: wrong shape");
  Tensor q = torch::stable::new_empty(qkv, {b, g * r, s, d});
  Tensor k = torch::stable::new_empty(qkv, {b, g, s, d});
  Tensor v = torch::stable::new_empty(qkv, {b, g, s, d});
  with_type(qkv, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Heads<T> hq(q), hk(k), hv(v);
    const T* source = in<T>(qkv);
    torch::stable::parallel_for(0, b * s, 64, [&](int64_t begin, int64_t end) {
      const auto rotate = rows<T>().rotate;
      for (int64_t token = begin; token < end; ++token) {
        const int64_t i = token / s, t = token % s;
        const int64_t angle = i * angles.batch + t * angles.half;
        const float *c = angles.cos + angle, *sn = angles.sin + angle;
        const T* from = source + token * g * (r + 2) * d;
        for (int64_t group = 0; group < g; ++group, from += (r + 2) * d) {
          for (int64_t h = 0; h < r; ++h)
            rotate(from + h * d, hq.at(i, group * r + h, t), c, sn, 1.0f, angles.half);
          rotate(from + r * d, hk.at(i, group, t), c, sn, 1.0f, angles.half);
          std::copy_n(from + (r + 1) * d, d, hv.at(i, group, t));
        }
      }
    });
  });
  return {q, k, v};
}

Tensor rotary_merge(const Tensor& dq, const Tensor& dk, const Tensor& dv, const Tensor& cos,
                    const Tensor& sin) {
  const int64_t b = dq.size(0), s = dq.size(2), g = dk.size(1), r = dq.size(1) / g;
  const int64_t d = dq.size(3);
  const Angles angles(cos, sin);
  STD_TORCH_CHECK(cos.size(1) == s && 2 * angles.half == d, "cos, sin: wrong shape");
  Tensor qkv = torch::stable::new_empty(dq, {b, s, g, r + 2, d});
  with_type(dq, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Heads<T> hq(dq), hk(dk), hv(dv);
    T* target = out<T>(qkv);
    torch::stable::parallel_for(0, b * s, 64, [&](int64_t begin, int64_t end) {
      const auto rotate = rows<T>().rotate;
      for (int64_t token = begin; token < end; ++token) {
        const int64_t i = token / s, t = token % s;
        const int64_t angle = i * angles.batch + t * angles.half;
        const float *c = angles.cos + angle, *sn = angles.sin + angle;
        T* to = target + token * g * (r + 2) * d;
        for (int64_t group = 0; group < g; ++group, to += (r + 2) * d) {
          for (int64_t h = 0; h < r; ++h)
            rotate(hq.at(i, group * r + h, t), to + h * d, c, sn, -1.0f, angles.half);
          rotate(hk.at(i, group, t), to + r * d, c, sn, -1.0f, angles.half);
          std::copy_n(hv.at(i, group, t), d, to + (r + 1) * d);
        }
      }
    });
  });
  return qkv;
}

// Null without AMX: elsewhere oneDNN's products are as good.
const ProductKernels* product_kernels() {
#ifdef __x86_64__
  if (level() == kAmx) return &amx::products;
#endif
  return nullptr;
}

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

STABLE_TORCH_LIBRARY(llmtrain, m) {
  m.def("kernel_set() -> str");
  m.def("has_attention() -> bool");
  m.def("has_products() -> bool");
  m.def("weight_gradient_(Tensor(a!) out, Tensor grad, Tensor x, bool add) -> ()");
  m.def(
      "attention(Tensor q, Tensor k, Tensor v, Tensor? first, float scale) -> (Tensor, Tensor)");
  m.def(
      "attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor result, Tensor lse, "
      "Tensor? first, float scale) -> (Tensor, Tensor, Tensor)");
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)");
  m.def(
      "add_rms_norm(Tensor x, Tensor branch, Tensor weight, float eps) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "rms_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor rstd, Tensor? residual) "
      "-> (Tensor, Tensor)");
  m.def("swiglu(Tensor x) -> Tensor");
  m.def("swiglu_backward(Tensor dy, Tensor x) -> Tensor");
  m.def(
      "cross_entropy_(Tensor(a!) logits, Tensor targets, Tensor weights, int vocab, "
      "float z_loss, float smoothing, bool grad) -> (Tensor, Tensor, Tensor)");
  m.def("rotary_split(Tensor qkv, Tensor cos, Tensor sin) -> (Tensor, Tensor, Tensor)");
  m.def(
      "rotary_merge(Tensor dq, Tensor dk, Tensor dv, Tensor cos, Tensor sin) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(llmtrain, CompositeExplicitAutograd, m) {
  m.impl("kernel_set", TORCH_BOX(&kernel_set));
  m.impl("has_attention", TORCH_BOX(&has_attention));
  m.impl("has_products", TORCH_BOX(&has_products));
}

STABLE_TORCH_LIBRARY_IMPL(llmtrain, CPU, m) {
  m.impl("weight_gradient_", TORCH_BOX(&weight_gradient_));
  m.impl("attention", TORCH_BOX(&attention));
  m.impl("attention_backward", TORCH_BOX(&attention_backward));
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("add_rms_norm", TORCH_BOX(&add_rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward));
  m.impl("swiglu", TORCH_BOX(&swiglu));
  m.impl("swiglu_backward", TORCH_BOX(&swiglu_backward));
  m.impl("cross_entropy_", TORCH_BOX(&cross_entropy_));
  m.impl("rotary_split", TORCH_BOX(&rotary_split));
  m.impl("rotary_merge", TORCH_BOX(&rotary_merge));
}

}  // namespace llmtrain
