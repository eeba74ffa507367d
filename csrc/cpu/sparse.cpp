// Products with a sparse matrix, vectorised over tokens. Compiled once per instruction set with
// KERNEL_SET naming its namespace; arithmetic is float32 whatever the storage.
#include "sparse.h"

#include "sparse_product.h"
#include "sparse_update.h"

namespace KERNEL_SET {

// Float32 multiply-adds; bfloat16 inputs are widened where they are turned.
struct Floats {
  using Token = float;
  static constexpr int kStep = kLanes;
  static Vec tokens(const float* x) { return load_once(x); }
  static Vec tokens_again(const float* x) { return load_vec(x); }
  static void multiply_add(Vec& sum, const Vec& a, const Vec& b) {
    KERNEL_SET::multiply_add(sum, a, b);
  }
#ifdef LLMTRAIN_ASM256
  static constexpr bool kWritten = true;
  static void add_column4(const float* w, const float* x, Vec* s) {
    KERNEL_SET::add_column4(w, x, s);
  }
  static void add_tokens4(const float* dy, const float* x, const float* y, const float* z, Vec* s) {
    KERNEL_SET::add_tokens4(dy, x, y, z, s);
  }
#else
  static constexpr bool kWritten = false;
#endif
  template <class T>
  static void turn_in(const T* x, int64_t count, int64_t columns, int64_t padded, int64_t width,
                      float* out) {
    turn_tokens(x, count, columns, padded, width, out);
  }
  template <class T>
  static void turn_out(const float* sums, int64_t width, int64_t rows, int64_t count, T* y) {
    turn_block(sums, width, rows, count, y, rows);
  }
};

template <class T>
void turn(const T* x, int64_t tokens, int64_t columns, int64_t multiple, float* out,
          int64_t index) {
  const int64_t padded = round_up(columns, multiple), first = index * kTokens;
  turn_tokens(x + first * columns, at_most(tokens - first, kTokens), columns, padded, kTokens,
              out + index * padded * kTokens);
}

template <class T>
constexpr llmtrain::SparseKernels<T> table() {
  return {panel, scratch<T>, group<Floats, T>, turn<T>};
}

extern const llmtrain::SparseSet sparse;
const llmtrain::SparseSet sparse = {table<float>(), table<bf16>(), gradient<Floats>,
                                    repack,         adamw,         lion};

}  // namespace KERNEL_SET
