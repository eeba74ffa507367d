// Which kernels run on this processor.
#include "dispatch.h"

#include <cstdlib>
#include <cstring>

#ifdef __x86_64__
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace avx512 {
extern const llmtrain::KernelSet kernels;
extern const llmtrain::FusedSet fused;
extern const llmtrain::Fp8Kernels fp8;
extern const llmtrain::SparseSet sparse;
}
namespace avx2 {
extern const llmtrain::KernelSet kernels;
extern const llmtrain::FusedSet fused;
extern const llmtrain::Fp8Kernels fp8;
extern const llmtrain::SparseSet sparse;
extern const llmtrain::GemmKernels gemm;
extern const llmtrain::FloatAttentionKernels float_attention;
}
namespace amx {
extern const llmtrain::AttentionKernels attention;
extern const llmtrain::ProductKernels products;
}
namespace avx512bf16 {
extern const llmtrain::AttentionKernels attention;
extern const llmtrain::SparsePairs sparse_pairs;
}
#endif
namespace baseline {
extern const llmtrain::KernelSet kernels;
extern const llmtrain::FusedSet fused;
extern const llmtrain::Fp8Kernels fp8;
extern const llmtrain::SparseSet sparse;
}

namespace llmtrain {

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
#ifdef LLMTRAIN_EMULATED
  return kAmx;  // tests/ops/check_avx512.py
#endif
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

const char* kernel_set() { return kLevelNames[level()]; }

const char* sources() { return LLMTRAIN_SOURCES; }

const KernelSet& best_kernels() {
#ifdef __x86_64__
  if (level() <= kAvx512) return avx512::kernels;
  if (level() == kAvx2) return avx2::kernels;
#endif
  return baseline::kernels;
}

template <>
const RowKernels<float>& rows<float>() {
  return best_kernels().f32;
}

template <>
const RowKernels<bf16>& rows<bf16>() {
  return best_kernels().b16;
}

const Fp8Kernels& fp8_kernels() {
#ifdef __x86_64__
  if (level() <= kAvx512) return avx512::fp8;
  if (level() == kAvx2) return avx2::fp8;
#endif
  return baseline::fp8;
}

const FusedSet& fused_kernels() {
#ifdef __x86_64__
  if (level() <= kAvx512) return avx512::fused;
  if (level() == kAvx2) return avx2::fused;
#endif
  return baseline::fused;
}

const SparseSet& sparse_kernels() {
#ifdef __x86_64__
  if (level() <= kAvx512) return avx512::sparse;
  if (level() == kAvx2) return avx2::sparse;
#endif
  return baseline::sparse;
}

// Null where the processor has no bfloat16 products.
const SparsePairs* sparse_pairs() {
#ifdef __x86_64__
  if (level() <= kAvx512Bf16) return &avx512bf16::sparse_pairs;
#endif
  return nullptr;
}

// Null where the processor has no bfloat16 products.
const AttentionKernels* attention_kernels() {
#ifdef __x86_64__
  if (level() == kAmx) return &amx::attention;
  if (level() == kAvx512Bf16) return &avx512bf16::attention;
#endif
  return nullptr;
}

// Null without AVX2, and with AVX-512, where the libraries have wider ones.
const GemmKernels* gemm_kernels() {
#ifdef __x86_64__
  if (level() == kAvx2) return &avx2::gemm;
#endif
  return nullptr;
}

const FloatAttentionKernels* float_attention_kernels() {
#ifdef __x86_64__
  if (level() == kAvx2) return &avx2::float_attention;
#endif
  return nullptr;
}

// Null without AMX: elsewhere oneDNN's products are as good.
const ProductKernels* product_kernels() {
#ifdef __x86_64__
  if (level() == kAmx) return &amx::products;
#endif
  return nullptr;
}

}  // namespace llmtrain
