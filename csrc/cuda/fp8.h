// Launchers of the FP8 kernels on CUDA.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace llmtrain {

// What is cast: float32 or bfloat16 as it lies in memory, times a power of two. master: float32
// that is rounded to bfloat16 first (weights; with their transposed copies only).
struct Source {
  const void* data;
  bool bfloat16;
  float factor;
  bool master;
};

// Whether the runtime and a kernel of this library work on the current device: the driver may be
// older than the toolkit, and the architecture may be one that was not built for.
cudaError_t probe();

// x [n] -> out [n].
cudaError_t cast(const Source& x, uint8_t* out, int64_t n, bool e5m2, cudaStream_t stream);

// x [rows, columns] -> out [rows, columns] and transposed [columns, rows]; x is read once.
cudaError_t cast_transpose(const Source& x, uint8_t* out, uint8_t* transposed, int64_t rows,
                           int64_t columns, bool e5m2, cudaStream_t stream);

// Bytes x [rows, columns] -> out [columns, rows].
cudaError_t transpose(const uint8_t* x, uint8_t* out, int64_t rows, int64_t columns,
                      cudaStream_t stream);

}  // namespace llmtrain
