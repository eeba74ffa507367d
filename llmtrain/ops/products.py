"""The weight gradient of a linear layer with float32 sums of bfloat16 operands."""

from __future__ import annotations

import torch
from torch import Tensor

from llmtrain.ops.native import kernels, products_usable


def weight_gradient_reference(grad: Tensor, x: Tensor, into: Tensor | None = None) -> Tensor:
    """``weight_gradient`` in plain PyTorch; sums of bfloat16 operands are rounded to bfloat16."""
    product = grad.t() @ x
    return product.float() if into is None else into.add_(product)


def weight_gradient(grad: Tensor, x: Tensor, into: Tensor | None = None) -> Tensor:
    """grad^T x in float32: [out, in] for grad [n, out] and x [n, in] of one dtype.

    into: a float32 tensor [out, in] that the product is added to in place and that is returned.
    """
    if not products_usable(grad):
        return weight_gradient_reference(grad, x, into)
    shape = (grad.shape[1], x.shape[1])
    out = torch.empty(shape, dtype=torch.float32) if into is None else into
    kernels().weight_gradient_(out, grad.contiguous(), x.contiguous(), into is not None)
    return out
