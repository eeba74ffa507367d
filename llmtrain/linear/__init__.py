"""Linear layers: a placement x a matmul x adapters.

``Placement`` says which collective surrounds the product, a ``Matmul`` is the three products of
a linear layer in one number format, and ``Linear`` is the module that puts them together with
one autograd function, so that every format works under every layout. Adapters (``LowRank``) are
the third factor. A ``Mask`` makes a layer sparse in whatever format it computes.
"""

from llmtrain.linear.adapter import Change, LowRank, adapted_weight
from llmtrain.linear.compact import Compact
from llmtrain.linear.fake import Numbers, fake_matmul, fake_vectors
from llmtrain.linear.fp8 import fp8_matmul
from llmtrain.linear.frozen import Frozen, FrozenMatmul
from llmtrain.linear.function import Plan, apply_linear, backward_for, summing_gradients
from llmtrain.linear.linear import Linear, OperandCache
from llmtrain.linear.masked import Mask, MaskedMatmul
from llmtrain.linear.matmul import BF16, FP32, FP32_NATIVE, FP32_ONEDNN, Matmul, matmul_for
from llmtrain.linear.operand import Operand, Packed, Reach
from llmtrain.linear.placement import Placement
from llmtrain.linear.sparse import SparseLinear, SparseMatmul
from llmtrain.linear.sparse_gpu import BLOCKS, BlockMatmul, SemiMatmul, sparse_matmul
from llmtrain.linear.te import TeMatmul, enter_recipe

__all__ = [
    "BF16",
    "BLOCKS",
    "FP32",
    "FP32_NATIVE",
    "FP32_ONEDNN",
    "BlockMatmul",
    "Change",
    "Compact",
    "Frozen",
    "FrozenMatmul",
    "Linear",
    "LowRank",
    "Mask",
    "MaskedMatmul",
    "Matmul",
    "Numbers",
    "Operand",
    "OperandCache",
    "Packed",
    "Placement",
    "Plan",
    "Reach",
    "SemiMatmul",
    "SparseLinear",
    "SparseMatmul",
    "TeMatmul",
    "adapted_weight",
    "apply_linear",
    "backward_for",
    "enter_recipe",
    "fake_matmul",
    "fake_vectors",
    "fp8_matmul",
    "matmul_for",
    "sparse_matmul",
    "summing_gradients",
]
