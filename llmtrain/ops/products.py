"""Weight gradients with float32 sums of bfloat16 operands, and products of float32 matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from llmtrain.ops.native import gemm_usable, kernels, products_usable


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


def product_reference(
    a: Tensor, b: Tensor, scale: float = 1.0, into: Tensor | None = None
) -> Tensor:
    """``product`` in plain PyTorch."""
    if into is not None:
        return into.addmm_(a, b.t(), alpha=scale)
    return a @ b.t() if scale == 1.0 else torch.addmm(a.new_empty(1), a, b.t(), beta=0, alpha=scale)


def product(a: Tensor, b: Tensor, scale: float = 1.0, into: Tensor | None = None) -> Tensor:
    """scale a b^T [m, n] for a [m, k] and b [n, k] of any strides.

    into: [m, n] with contiguous rows, which the product is added to in place and which is returned.
    In float32 each element is a sum in one order whatever m, n, the strides and the threads are.
    """
    if not gemm_usable(a):
        return product_reference(a, b, scale, into)
    out = a.new_empty(a.shape[0], b.shape[0]) if into is None else into
    kernels().product_(out, a, b, scale, into is not None)
    return out
