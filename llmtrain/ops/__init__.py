"""Fused operators: the Python face of ``csrc/`` with their plain PyTorch references.

Each module here holds one operator three times: a reference in plain PyTorch, an autograd
function over the compiled kernels, and the public function that picks between them by device
and dtype. Without the compiled library (``python -m llmtrain.ops.build``) everything runs on the
references: the same numbers to round-off, slower.
"""

from llmtrain.ops.attention import (
    attention_reference,
    cached_attention,
    causal_attention,
    first_of_document,
    sqrt_attention,
)
from llmtrain.ops.cross_entropy import cross_entropy_, cross_entropy_reference_
from llmtrain.ops.cuda import cublaslt_fault
from llmtrain.ops.cuda import load_fault as cuda_fault
from llmtrain.ops.dropout import dropout, stream_number, token_keys
from llmtrain.ops.fp8 import (
    E4M3,
    E5M2,
    FP8_MAX,
    fp8_cast,
    fp8_cast_transpose,
    fp8_transpose,
    fp8_uncast,
    fp8_weight,
)
from llmtrain.ops.fused import (
    Casts,
    Handoff,
    NormTerms,
    activation_backward_cast,
    activation_cast,
    add_norm_cast,
    fuses_activation,
    fuses_norm,
    norm_join_cast,
)
from llmtrain.ops.glu import swiglu, swiglu_reference
from llmtrain.ops.native import (
    attention_usable,
    gemm_usable,
    kernels_line,
    kernels_warning,
    native_loaded,
)
from llmtrain.ops.norm import add_rms_norm, rms_norm, rms_norm_reference
from llmtrain.ops.products import (
    fp8_wgrad_,
    fp8_wgrad_reference_,
    product,
    product_reference,
    weight_gradient,
    weight_gradient_reference,
)
from llmtrain.ops.rotary import rotate, split_rotary, split_rotary_reference
from llmtrain.ops.sparse import (
    Packed,
    copy_across,
    gather_tiles,
    masked,
    pack,
    repack,
    sparse_dgrad,
    sparse_fprop,
    sparse_wgrad,
    unpack,
)
from llmtrain.ops.window import (
    FLEX_MIN_HEAD,
    Window,
    attention_partial,
    attention_partial_backward,
    make_window,
    merge_partial,
    window_attention,
)

__all__ = [
    "E4M3",
    "E5M2",
    "FLEX_MIN_HEAD",
    "FP8_MAX",
    "Casts",
    "Handoff",
    "NormTerms",
    "Packed",
    "Window",
    "activation_backward_cast",
    "activation_cast",
    "add_norm_cast",
    "add_rms_norm",
    "attention_partial",
    "attention_partial_backward",
    "attention_reference",
    "attention_usable",
    "cached_attention",
    "causal_attention",
    "copy_across",
    "cross_entropy_",
    "cross_entropy_reference_",
    "cublaslt_fault",
    "cuda_fault",
    "dropout",
    "first_of_document",
    "fp8_cast",
    "fp8_cast_transpose",
    "fp8_transpose",
    "fp8_uncast",
    "fp8_weight",
    "fp8_wgrad_",
    "fp8_wgrad_reference_",
    "fuses_activation",
    "fuses_norm",
    "gather_tiles",
    "gemm_usable",
    "kernels_line",
    "kernels_warning",
    "make_window",
    "masked",
    "merge_partial",
    "native_loaded",
    "norm_join_cast",
    "pack",
    "product",
    "product_reference",
    "repack",
    "rms_norm",
    "rms_norm_reference",
    "rotate",
    "sparse_dgrad",
    "sparse_fprop",
    "sparse_wgrad",
    "split_rotary",
    "split_rotary_reference",
    "sqrt_attention",
    "stream_number",
    "swiglu",
    "swiglu_reference",
    "token_keys",
    "unpack",
    "weight_gradient",
    "weight_gradient_reference",
    "window_attention",
]
