// Row kernels in plain loops that the compiler vectorises. Compiled once per instruction set with
// KERNEL_SET naming its namespace; arithmetic is float32 whatever the storage. No templates or
// inline functions of the standard library here: the linker would keep one copy for all sets.
#include "rows.h"

#include "number.h"

namespace KERNEL_SET {

template <class T>
float rstd_of(const T* x, int64_t d, float eps) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < d; ++i) {
    const float v = load(x[i]);
    sum += v * v;
  }
  return 1.0f / __builtin_sqrtf(sum / static_cast<float>(d) + eps);
}

template <class T>
void rms_norm(const T* x, const T* weight, T* y, float* rstd, int64_t d, float eps, int64_t begin,
              int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T* in = x + row * d;
    T* out = y + row * d;
    const float scale = rstd[row] = rstd_of(in, d, eps);
#pragma omp simd
    for (int64_t i = 0; i < d; ++i) store(out[i], load(in[i]) * scale * load(weight[i]));
  }
}

template <class T>
void add_rms_norm(const T* x, const T* branch, const T* weight, T* sum, T* y, float* rstd,
                  int64_t d, float eps, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T* a = x + row * d;
    const T* b = branch + row * d;
    T* out = sum + row * d;
#pragma omp simd
    for (int64_t i = 0; i < d; ++i) store(out[i], load(a[i]) + load(b[i]));
    rms_norm(sum, weight, y, rstd, d, eps, row, row + 1);
  }
}

template <class T>
void rms_norm_backward(const T* dy, const T* x, const T* weight, const float* rstd,
                       const T* residual, T* dx, float* dweight, int64_t d, int64_t begin,
                       int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T* g = dy + row * d;
    const T* in = x + row * d;
    T* out = dx + row * d;
    const float scale = rstd[row];
    float dot = 0.0f;
#pragma omp simd reduction(+ : dot)
    for (int64_t i = 0; i < d; ++i) {
      const float gx = load(g[i]) * load(in[i]);
      dweight[i] += gx * scale;
      dot += gx * load(weight[i]);
    }
    const float pull = dot * scale * scale * scale / static_cast<float>(d);
    if (residual == nullptr) {
#pragma omp simd
      for (int64_t i = 0; i < d; ++i)
        store(out[i], load(g[i]) * load(weight[i]) * scale - load(in[i]) * pull);
    } else {
      const T* add = residual + row * d;
#pragma omp simd
      for (int64_t i = 0; i < d; ++i)
        store(out[i], load(add[i]) + load(g[i]) * load(weight[i]) * scale - load(in[i]) * pull);
    }
  }
}

template <class T>
void swiglu(const T* x, T* out, int64_t f, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T* pairs = x + row * 2 * f;
    T* y = out + row * f;
#pragma omp simd
    for (int64_t i = 0; i < f; ++i) {
      const float g = load(pairs[2 * i]);
      store(y[i], g * logistic(g).value * load(pairs[2 * i + 1]));
    }
  }
}

template <class T>
void swiglu_backward(const T* dy, const T* x, T* dx, int64_t f, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T* pairs = x + row * 2 * f;
    const T* grad = dy + row * f;
    T* d_pairs = dx + row * 2 * f;
#pragma omp simd
    for (int64_t i = 0; i < f; ++i) {
      const float g = load(pairs[2 * i]), dout = load(grad[i]);
      const Logistic s = logistic(g);
      store(d_pairs[2 * i], dout * load(pairs[2 * i + 1]) * s.value * (1.0f + g * s.rest));
      store(d_pairs[2 * i + 1], dout * g * s.value);
    }
  }
}

template <class T>
void rotate(const T* x, T* out, const float* cos, const float* sin, float sign, int64_t half) {
#pragma omp simd
  for (int64_t i = 0; i < half; ++i) {
    const float a = load(x[i]), b = load(x[i + half]);
    const float c = cos[i], s = sign * sin[i];
    store(out[i], a * c - b * s);
    store(out[i + half], b * c + a * s);
  }
}

template <class T>
void cross_entropy(T* logits, const int64_t* targets, const float* weights, float* nll,
                   float* loss, float* z, float* e, const llmtrain::CrossEntropy& terms, int64_t begin,
                   int64_t end) {
  const int64_t vocab = terms.vocab;
  for (int64_t row = begin; row < end; ++row) {
    T* x = logits + row * terms.padded;
    float top = -__builtin_inff(), sum = 0.0f, total = 0.0f;
#pragma omp simd reduction(max : top)
    for (int64_t i = 0; i < vocab; ++i) {
      const float v = load(x[i]);
      top = v > top ? v : top;
    }
#pragma omp simd reduction(+ : sum, total)
    for (int64_t i = 0; i < vocab; ++i) {
      const float v = load(x[i]);
      e[i] = exponential(v - top);
      sum += e[i];
      total += v;
    }
    const int64_t target = targets[row];
    const float lse = top + __builtin_logf(sum);
    const float keep = 1.0f - terms.smoothing, spread = terms.smoothing / vocab;
    nll[row] = lse - load(x[target]);
    z[row] = terms.z_loss * lse * lse;
    loss[row] = keep * nll[row] + terms.smoothing * lse - spread * total + z[row];
    if (!terms.grad) continue;
    const float weight = weights[row];
    const float slope = weight * (1.0f + 2.0f * terms.z_loss * lse) / sum;
    const float floor = weight * spread;
#pragma omp simd
    for (int64_t i = 0; i < vocab; ++i) store(x[i], e[i] * slope - floor);
    store(x[target], e[target] * slope - floor - weight * keep);
    for (int64_t i = vocab; i < terms.padded; ++i) store(x[i], 0.0f);
  }
}

template <class T>
constexpr llmtrain::RowKernels<T> table() {
  return {rms_norm<T>,        add_rms_norm<T>, rms_norm_backward<T>, swiglu<T>,
          swiglu_backward<T>, rotate<T>,       cross_entropy<T>};
}

extern const llmtrain::KernelSet kernels;
const llmtrain::KernelSet kernels = {table<float>(), table<bf16>()};

}  // namespace KERNEL_SET
