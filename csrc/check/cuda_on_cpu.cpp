// The launchers of csrc/cuda for ctypes; NAME.cu are its files, launches rewritten (check_kernels.py).
#include "cuda_on_cpu.h"
#include UNIT

using namespace llmtrain;

extern "C" {

#ifdef CASTS
int run_cast_transpose(const void* x, bool bfloat16, bool master, float factor, uint8_t* out,
                       uint8_t* turned, int64_t rows, int64_t columns, bool e5m2) {
  return cast_transpose({x, bfloat16, factor, master}, out, turned, rows, columns, e5m2, nullptr);
}
#else
int run_norm(const NormData* data, bool join, uint8_t* out, uint8_t* turned, int64_t rows,
             int64_t columns) {
  const Result result{out, turned, rows, columns};
  return join ? norm_join_cast(*data, result, nullptr) : add_norm_cast(*data, result, nullptr);
}

int run_activation(const void* x, void* y, bool bfloat16, int64_t activation, uint8_t* out,
                   uint8_t* turned, int64_t rows, int64_t columns) {
  return activation_cast(x, y, bfloat16, activation, {out, turned, rows, columns}, nullptr);
}

int run_activation_backward(const void* dy, const void* x, void* dx, bool bfloat16,
                            int64_t activation, float factor, uint8_t* out, uint8_t* turned,
                            int64_t rows, int64_t columns) {
  return activation_backward_cast(dy, x, dx, bfloat16, activation, factor,
                                  {out, turned, rows, columns}, nullptr);
}
#endif
}
