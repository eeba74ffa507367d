// LayerNorm and activations in plain loops that the compiler vectorises. Compiled once per
// instruction set with KERNEL_SET naming its namespace (see rows.cpp).
#include "fused.h"

#include "number.h"

namespace KERNEL_SET {

template <class T>
void layer_norm(const T* x, const T* weight, const T* bias, T* y, float* mean, float* rstd,
                int64_t d, float eps, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T* in = x + row * d;
    T* out = y + row * d;
    float sum = 0.0f, squares = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < d; ++i) sum += load(in[i]);
    const float middle = mean[row] = sum / static_cast<float>(d);
    // Around the mean: the difference of two large sums would lose digits.
#pragma omp simd reduction(+ : squares)
    for (int64_t i = 0; i < d; ++i) {
      const float v = load(in[i]) - middle;
      squares += v * v;
    }
    const float scale = rstd[row] =
        1.0f / __builtin_sqrtf(squares / static_cast<float>(d) + eps);
    if (bias == nullptr) {
#pragma omp simd
      for (int64_t i = 0; i < d; ++i)
        store(out[i], (load(in[i]) - middle) * scale * load(weight[i]));
    } else {
#pragma omp simd
      for (int64_t i = 0; i < d; ++i)
        store(out[i], (load(in[i]) - middle) * scale * load(weight[i]) + load(bias[i]));
    }
  }
}

template <class T>
void layer_norm_backward(const T* dy, const T* x, const T* weight, const float* mean,
                         const float* rstd, const T* residual, T* dx, float* dweight,
                         float* dbias, int64_t d, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T* g = dy + row * d;
    const T* in = x + row * d;
    T* out = dx + row * d;
    const float middle = mean[row], scale = rstd[row];
    float sum = 0.0f, dot = 0.0f;
#pragma omp simd reduction(+ : sum, dot)
    for (int64_t i = 0; i < d; ++i) {
      const float grad = load(g[i]), normed = (load(in[i]) - middle) * scale;
      dweight[i] += grad * normed;
      dbias[i] += grad;
      sum += grad * load(weight[i]);
      dot += grad * load(weight[i]) * normed;
    }
    sum /= static_cast<float>(d);
    dot /= static_cast<float>(d);
    const T* add = residual == nullptr ? nullptr : residual + row * d;
    if (add == nullptr) {
#pragma omp simd
      for (int64_t i = 0; i < d; ++i) {
        const float normed = (load(in[i]) - middle) * scale;
        store(out[i], (load(g[i]) * load(weight[i]) - sum - normed * dot) * scale);
      }
    } else {
#pragma omp simd
      for (int64_t i = 0; i < d; ++i) {
        const float normed = (load(in[i]) - middle) * scale;
        store(out[i],
              load(add[i]) + (load(g[i]) * load(weight[i]) - sum - normed * dot) * scale);
      }
    }
  }
}

template <class T>
void join(const T* a, const T* b, T* out, float stay, int64_t n) {
  if (b == nullptr) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) store(out[i], stay * load(a[i]));
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) store(out[i], stay * load(a[i]) + load(b[i]));
  }
}

// Within 1e-7: the polynomials of N. Juffa's erff (2016, public domain). NaN stays NaN.
inline float error_function(float x) {
  const float magnitude = x < 0.0f ? -x : x;
  const float t = magnitude > 4.5f ? 4.5f : magnitude, s = t * t;  // 1 from 4 on
  float outer = -1.72853470e-5f * t + 3.83197126e-4f;
  outer = outer * s + (-3.88396438e-3f * t + 2.42546219e-2f);
  outer = outer * t - 1.06777877e-1f;
  outer = outer * t - 6.34846687e-1f;
  outer = outer * t - 1.28717512e-1f;
  outer = 1.0f - exponential(outer * t - t);
  float inner = -5.96761703e-4f;
  inner = inner * s + 4.99119423e-3f;
  inner = inner * s - 2.67681349e-2f;
  inner = inner * s + 1.12819925e-1f;
  inner = inner * s - 3.76125336e-1f;
  inner = inner * s + 1.28379166e-1f;
  inner = inner * t + t;
  const float value = t > 0.927734375f ? outer : inner;
  return x < 0.0f ? -value : value;
}

constexpr float kRootHalf = 0.70710678f, kDensity = 0.39894228f;   // 1/sqrt(2), 1/sqrt(2 pi)
constexpr float kTanh = 2.0f * 0.79788456f, kCubic = 0.044715f;    // 2 sqrt(2/pi)

// Where an activation's slope is 0 or 1 to the last digit, so that products with a huge x vanish.
inline float within(float x, float bound) {
  const float low = x < -bound ? -bound : x;
  return low > bound ? bound : low;
}

// Each with its value and its slope at x.
struct Gelu {
  static float value(float x) { return 0.5f * x * (1.0f + error_function(x * kRootHalf)); }
  static float slope(float x) {
    const float t = within(x, 13.0f);
    const float density = kDensity * exponential(-0.5f * t * t);
    return 0.5f * (1.0f + error_function(x * kRootHalf)) + t * density;
  }
};

// 0.5 x (1 + tanh(u / 2)) = x sigmoid(u).
struct GeluTanh {
  static float inner(float x) { return kTanh * (x + kCubic * x * x * x); }
  static float value(float x) { return x * logistic(inner(x)).value; }
  static float slope(float x) {
    const float t = within(x, 20.0f);
    const Logistic s = logistic(inner(t));
    return s.value + t * s.value * s.rest * kTanh * (1.0f + 3.0f * kCubic * t * t);
  }
};

struct Silu {
  static float value(float x) { return x * logistic(x).value; }
  static float slope(float x) {
    const Logistic s = logistic(x);
    return s.value * (1.0f + x * s.rest);
  }
};

struct Relu {
  static float value(float x) { return x < 0.0f ? 0.0f : x; }
  static float slope(float x) { return x <= 0.0f ? 0.0f : 1.0f; }
};

template <class A, class T>
void activate(const T* x, T* y, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) store(y[i], A::value(load(x[i])));
}

template <class A, class T>
void activate_backward(const T* dy, const T* x, T* dx, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) store(dx[i], load(dy[i]) * A::slope(load(x[i])));
}

template <class T>
constexpr llmtrain::FusedKernels<T> fused_table() {
  return {layer_norm<T>,
          layer_norm_backward<T>,
          join<T>,
          {activate<Gelu, T>, activate<GeluTanh, T>, activate<Silu, T>, activate<Relu, T>, nullptr},
          {activate_backward<Gelu, T>, activate_backward<GeluTanh, T>, activate_backward<Silu, T>,
           activate_backward<Relu, T>, nullptr}};
}

extern const llmtrain::FusedSet fused;
const llmtrain::FusedSet fused = {fused_table<float>(), fused_table<bf16>()};

}  // namespace KERNEL_SET
