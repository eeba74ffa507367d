// The operators llmtrain::* on CPU tensors that work on rows, through torch's stable ABI
// (torch >= 2.11).
#include "bindings.h"

namespace llmtrain {

// Rows of a norm's weight gradient that are summed by one thread. Fixed, so that the result does
// not depend on the number of threads.
constexpr int64_t kNormBlock = 128;

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

STABLE_TORCH_LIBRARY(llmtrain, m) {
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

STABLE_TORCH_LIBRARY_IMPL(llmtrain, CPU, m) {
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
