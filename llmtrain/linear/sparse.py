"""Sparse products on the CPU: a masked matmul that is faster, and a layer that holds no zeros.

``SparseMatmul`` computes what ``MaskedMatmul`` does with the kernels of ``llmtrain.ops.sparse``;
the weight stays dense, so that layouts, checkpoints and optimizers need not know. ``SparseLinear``
has the kept weights alone: weight, gradient and moments shrink with the density.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from llmtrain.linear.masked import Mask, MaskedMatmul
from llmtrain.linear.matmul import ALONE, Matmul
from llmtrain.linear.operand import Operand, Packed, Reach
from llmtrain.ops import Packed as Tiled
from llmtrain.ops import pack, repack, sparse_dgrad, sparse_fprop, sparse_wgrad, unpack


class SparseMatmul(MaskedMatmul):
    """``MaskedMatmul`` by sparse products, for a plain ``inner`` (float32 or bfloat16) on the CPU.

    Weights are read as float32, where a dense bfloat16 product would round them first; with
    bfloat16 inputs products of AVX512-BF16 do so too. The values are packed again in place whenever
    the weight has changed. There is no second mask.
    """

    def __init__(self, inner: Matmul, mask: Mask, index: Tiled | None = None) -> None:
        assert not inner.packs
        super().__init__(inner, mask)
        self.name = f"{inner.name}, sparse"
        if index is None:
            index = pack(torch.zeros(mask.shape, device=mask.kept.device), mask.kept, mask.block)
        self.index = index

    def operand(self, weight: Tensor, reach: Reach = ALONE) -> Packed:
        repack(self.index, weight)
        return Packed(self.index.values, None, self.index.backward.values)

    def fprop(self, x: Operand, weight: Operand, bias: Tensor | None, scale: float = 1.0) -> Tensor:
        y = sparse_fprop(plain_values(x), self.index)
        y = y if scale == 1.0 else y.mul_(scale)
        return y if bias is None else y.add_(bias.to(y.dtype))

    def dgrad(self, grad: Operand, weight: Operand, scale: float = 1.0) -> Tensor:
        dx = sparse_dgrad(plain_values(grad), self.index)
        return dx if scale == 1.0 else dx.mul_(scale)

    def wgrad(
        self, grad: Operand, x: Operand, into: Tensor | None = None, scale: float = 1.0
    ) -> Tensor:
        if self.dense_gradients:
            return super().wgrad(grad, x, into, scale)
        values = sparse_wgrad(plain_values(grad), plain_values(x), self.index)
        product = unpack(values if scale == 1.0 else values.mul_(scale), self.index)
        return product if into is None else into.add_(product)


def plain_values(x: Operand) -> Tensor:
    """The tensor in an operand of a plain format."""
    assert isinstance(x, Packed) and x.values is not None
    return x.values


class _SparseFunction(torch.autograd.Function):
    """y = x W^T with the packed values of W as the leaf that learns."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, layer: SparseLinear) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        ctx.save_for_backward(flat if ctx.needs_input_grad[1] else None)
        ctx.layer, ctx.shape = layer, x.shape
        return sparse_fprop(flat, layer.packed).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (x,) = ctx.saved_tensors
        packed = ctx.layer.packed
        flat = grad.reshape(-1, grad.shape[-1])
        dx = sparse_dgrad(flat, packed).view(ctx.shape) if ctx.needs_input_grad[0] else None
        return dx, None if x is None else sparse_wgrad(flat, x, packed), None


class SparseLinear(nn.Module):
    """y = x weight^T + bias that holds the kept weights only.

    weight: [out, in] to start from, at ``mask``. The parameter ``values`` is ``packed.values``,
    [tiles, tile width, tile height] float32; ``llmtrain.optim.SparseAdamW`` updates it together
    with the copy that dgrad reads. After any other change of ``values``: ``copy_across``.
    """

    def __init__(self, weight: Tensor, mask: Mask, bias: Tensor | None = None) -> None:
        super().__init__()
        self.packed = pack(weight.detach(), mask.kept, mask.block)
        self.values = nn.Parameter(self.packed.values)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    def forward(self, x: Tensor, casts: None = None) -> Tensor:
        """x [..., in] of float32 or bfloat16 -> [..., out] of its dtype. casts: none, see
        ``takes_casts``."""
        y: Tensor = _SparseFunction.apply(x, self.values, self)  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def takes_casts(self, x: Tensor) -> bool:
        """Whether what comes before may hand over a cast of ``x`` instead: never."""
        return False

    def dense(self) -> Tensor:
        """The weight [out, in] with zeros, a copy."""
        return unpack(self.values.detach(), self.packed)
