// The operators llmtrain::fp8_* on CPU tensors, through torch's stable ABI (torch >= 2.11).
#include "bindings.h"

namespace llmtrain {

// Elements that are worth a thread.
constexpr int64_t kGrain = 1 << 15;

ScalarType format(bool e5m2) {
  return e5m2 ? ScalarType::Float8_e5m2 : ScalarType::Float8_e4m3fn;
}

const Fp8Casts<float>& casts(float*, bool e5m2) {
  return e5m2 ? fp8_kernels().e5m2_f32 : fp8_kernels().e4m3_f32;
}

const Fp8Casts<bf16>& casts(bf16*, bool e5m2) {
  return e5m2 ? fp8_kernels().e5m2_b16 : fp8_kernels().e4m3_b16;
}

// Runs fn on the rows of a matrix, in blocks of whole tiles.
template <class F>
void over_tiles(int64_t rows, int64_t columns, const F& fn) {
  if (columns == 0) return;
  const int64_t tiles = (rows + kFp8Tile - 1) / kFp8Tile;
  const int64_t grain = std::max<int64_t>(1, kGrain / (kFp8Tile * columns));
  torch::stable::parallel_for(0, tiles, grain, [&](int64_t begin, int64_t end) {
    fn(begin * kFp8Tile, std::min(rows, end * kFp8Tile));
  });
}

Tensor fp8_cast(const Tensor& x, bool e5m2) {
  check(x, x.scalar_type(), "x");
  Tensor y = torch::stable::new_empty(x, x.sizes(), format(e5m2));
  with_type(x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* from = in<T>(x);
    uint8_t* to = out<uint8_t>(y);
    const auto kernel = casts(type, e5m2).cast;
    torch::stable::parallel_for(0, x.numel(), kGrain, [&](int64_t begin, int64_t end) {
      kernel(from + begin, to + begin, end - begin);
    });
  });
  return y;
}

Pair fp8_cast_transpose(const Tensor& x, bool e5m2) {
  check(x, x.scalar_type(), "x");
  STD_TORCH_CHECK(x.dim() == 2, "x: two dimensions");
  const int64_t rows = x.size(0), columns = x.size(1);
  Tensor y = torch::stable::new_empty(x, {rows, columns}, format(e5m2));
  Tensor t = torch::stable::new_empty(x, {columns, rows}, format(e5m2));
  with_type(x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* from = in<T>(x);
    uint8_t *to = out<uint8_t>(y), *across = out<uint8_t>(t);
    const auto kernel = casts(type, e5m2).cast_transpose;
    over_tiles(rows, columns, [&](int64_t begin, int64_t end) {
      kernel(from, to, across, rows, columns, begin, end);
    });
  });
  return {y, t};
}

Tensor fp8_uncast(const Tensor& x, bool bfloat16) {
  const bool e5m2 = x.scalar_type() == ScalarType::Float8_e5m2;
  check(x, format(e5m2), "x");
  Tensor y = torch::stable::new_empty(x, x.sizes(),
                                      bfloat16 ? ScalarType::BFloat16 : ScalarType::Float);
  with_type(y, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const uint8_t* from = in<uint8_t>(x);
    T* to = out<T>(y);
    const auto kernel = casts(type, e5m2).uncast;
    torch::stable::parallel_for(0, x.numel(), kGrain, [&](int64_t begin, int64_t end) {
      kernel(from + begin, to + begin, end - begin);
    });
  });
  return y;
}

Tensor fp8_transpose(const Tensor& x) {
  check(x, format(x.scalar_type() == ScalarType::Float8_e5m2), "x");
  STD_TORCH_CHECK(x.dim() == 2, "x: two dimensions");
  const int64_t rows = x.size(0), columns = x.size(1);
  Tensor y = torch::stable::new_empty(x, {columns, rows}, x.scalar_type());
  const uint8_t* from = in<uint8_t>(x);
  uint8_t* to = out<uint8_t>(y);
  over_tiles(rows, columns, [&](int64_t begin, int64_t end) {
    fp8_kernels().transpose(from, to, rows, columns, begin, end);
  });
  return y;
}

STABLE_TORCH_LIBRARY_FRAGMENT(llmtrain, m) {
  m.def("fp8_cast(Tensor x, bool e5m2) -> Tensor");
  m.def("fp8_cast_transpose(Tensor x, bool e5m2) -> (Tensor, Tensor)");
  m.def("fp8_uncast(Tensor x, bool bfloat16) -> Tensor");
  m.def("fp8_transpose(Tensor x) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(llmtrain, CPU, m) {
  m.impl("fp8_cast", TORCH_BOX(&fp8_cast));
  m.impl("fp8_cast_transpose", TORCH_BOX(&fp8_cast_transpose));
  m.impl("fp8_uncast", TORCH_BOX(&fp8_uncast));
  m.impl("fp8_transpose", TORCH_BOX(&fp8_transpose));
}

}  // namespace llmtrain
