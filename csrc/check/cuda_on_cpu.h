// CUDA's kernels as plain C++ for `make check-kernels`: a thread for every thread of a block, blocks
// one after the other. What a GPU adds (timing, memory model, launch limits) is not checked by it.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <barrier>
#include <cmath>
#include <cstdint>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

namespace on_cpu {

struct Index {
  unsigned x;
};
inline thread_local Index thread, block, grid;
inline std::unique_ptr<std::barrier<>> all;
inline std::vector<std::unique_ptr<std::barrier<>>> warps;
inline float lanes[32][32];

inline void sync() { all->arrive_and_wait(); }

inline float shuffle(unsigned, float x, int mask) {
  const unsigned warp = thread.x / 32, lane = thread.x % 32;
  lanes[warp][lane] = x;
  warps[warp]->arrive_and_wait();
  const float y = lanes[warp][lane ^ mask];
  warps[warp]->arrive_and_wait();
  return y;
}

inline uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i)
    out |= static_cast<uint32_t>(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return out;
}

template <class T>
T load(const T* p) {
  return *p;
}

inline float exponential(float x) { return std::exp(x); }
inline float inverse_root(float x) { return 1.0f / std::sqrt(x); }
inline float inverse(float x) { return 1.0f / x; }
inline cudaError_t no_error() { return cudaSuccess; }
template <class F>
cudaError_t attributes(cudaFuncAttributes*, F*) {
  return cudaSuccess;
}

// What stands for kernel<<<blocks, threads, 0, stream>>>(...).
inline void launch(unsigned blocks, unsigned threads, const std::function<void()>& kernel) {
  for (unsigned b = 0; b < blocks; ++b) {
    all = std::make_unique<std::barrier<>>(threads);
    warps.clear();
    for (unsigned w = 0; w < threads / 32; ++w)
      warps.push_back(std::make_unique<std::barrier<>>(32));
    std::vector<std::thread> pool;
    for (unsigned t = 0; t < threads; ++t)
      pool.emplace_back([&, t] {
        thread = {t}, block = {b}, grid = {blocks};
        kernel();
        all->arrive_and_drop();
      });
    for (auto& each : pool) each.join();
  }
}

}  // namespace on_cpu

#undef __global__
#undef __device__
#undef __shared__
#undef __launch_bounds__
#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(n)
#define threadIdx on_cpu::thread
#define blockIdx on_cpu::block
#define gridDim on_cpu::grid
#define __syncthreads on_cpu::sync
#define __shfl_xor_sync on_cpu::shuffle
#define __byte_perm on_cpu::permute
#define __ldg on_cpu::load
#define __expf on_cpu::exponential
#define __frcp_rn on_cpu::inverse
#define rsqrtf on_cpu::inverse_root
#define cudaGetLastError on_cpu::no_error
#define cudaFuncGetAttributes on_cpu::attributes
