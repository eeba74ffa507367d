"""Weight gradients with float32 sums of bfloat16 or FP8 operands, and float32 products."""

from __future__ import annotations

import torch
from torch import Tensor

from llmtrain.ops.cuda import cublaslt_fault, cuda_kernels
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


def fp8_wgrad_reference_(
    total: Tensor,
    grad: Tensor,
    x: Tensor,
    factor: float = 1.0,
    grad_scale: Tensor | None = None,
    x_scale: Tensor | None = None,
) -> None:
    """``fp8_wgrad_`` in plain PyTorch, on any device."""
    product = grad.float() @ x.float().t()
    for scale in (grad_scale, x_scale):
        product = product if scale is None else product * scale
    total.add_(product, alpha=factor)


def fp8_wgrad_(
    total: Tensor,
    grad: Tensor,
    x: Tensor,
    factor: float = 1.0,
    grad_scale: Tensor | None = None,
    x_scale: Tensor | None = None,
) -> bool:
    """total [out, in] float32 += factor grad x^T, of grad [out, n] in e5m2 and x [in, n] in e4m3,
    both contiguous (the transposed copies), in and n multiples of 16; scales: 0-dim float32 that
    multiply the operands, None: 1.

    On CUDA the sum is taken within the product, by cuBLASLt: 8 bytes of a weight are moved instead
    of 20. Returns False, and does nothing, where the library was built without cuBLASLt
    (``llmtrain doctor`` says why) or it has no algorithm for the shape.
    """
    if not total.is_cuda:
        fp8_wgrad_reference_(total, grad, x, factor, grad_scale, x_scale)
        return True
    if cublaslt_fault() is not None:
        return False
    done: bool = cuda_kernels().fp8_wgrad_(total, grad, x, factor, grad_scale, x_scale)
    return done


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
