// The kernels of the best instruction set that this processor has.
#pragma once

#include "attention.h"
#include "fp8.h"
#include "fused.h"
#include "gemm.h"
#include "products.h"
#include "rows.h"
#include "sparse.h"

namespace llmtrain {

// The name of the set in use, best first: amx, avx512_bf16, avx512, avx2, baseline. The variable
// LLMTRAIN_CPU_KERNELS names the best one to use, to compare the others with it.
const char* kernel_set();

// The stamp of the sources that this library was compiled from (llmtrain/ops/native.py).
const char* sources();

// For T float and bf16.
template <class T>
const RowKernels<T>& rows();

const Fp8Kernels& fp8_kernels();

const FusedSet& fused_kernels();

const SparseSet& sparse_kernels();

// Null where the processor has no bfloat16 products.
const SparsePairs* sparse_pairs();

// Null where the processor has no bfloat16 products.
const AttentionKernels* attention_kernels();

// Null without AVX2, and with AVX-512, where the libraries have wider ones.
const GemmKernels* gemm_kernels();
const FloatAttentionKernels* float_attention_kernels();

// Null without AMX: elsewhere oneDNN's products are as good.
const ProductKernels* product_kernels();

}  // namespace llmtrain
