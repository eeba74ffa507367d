// The launchers of csrc/cuda's sparse kernels for ctypes, as cuda_on_cpu.cpp has the others.
#include "cuda_on_cpu.h"
#include UNIT

using namespace llmtrain;

extern "C" {

#if defined(MASKS)
int run_mask_apply(void* x, int element, const BlockMask* mask) {
  return mask_apply(x, element, *mask, nullptr);
}

int run_transposable(const float* scores, bool* kept, int64_t rows, int64_t columns,
                     const int32_t* patterns, int count) {
  return transposable(scores, kept, rows, columns, patterns, count, nullptr);
}

int run_masked_adamw(const MaskedAdamW* job, const BlockMask* mask) {
  return masked_adamw(*job, *mask, nullptr);
}
#elif defined(SEMI)
int run_semi_meta(const SemiMask* mask, int16_t* meta) { return semi_meta(*mask, meta, nullptr); }

int run_semi_repack(const SemiMask* mask, const void* weight, bool bfloat16, void* values) {
  return semi_repack(*mask, weight, bfloat16, static_cast<__nv_bfloat16*>(values), nullptr);
}
#else
void set_late_copies(bool late) { on_cpu::late_copies = late; }

int run_block_product(const BlockProduct* job, bool turned) {
  return block_product(*job, turned, nullptr);
}

int run_block_gradient(const BlockGradient* job) { return block_gradient(*job, nullptr); }

int run_block_pack(const BlockPack* job) { return block_pack(*job, nullptr); }
#endif
}
