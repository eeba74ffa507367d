"""Sparse products on a GPU as masked matmuls: 2:4 through torch's libraries, blocks of 64 x 64.

They compute what ``MaskedMatmul`` does in bfloat16; the weight stays dense and float32, and its
kept values are packed whenever it has changed. Which of them a layer gets is measured
(``llmtrain.sparsity``).
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmtrain.linear.masked import Mask, MaskedMatmul
from llmtrain.linear.matmul import ALONE, Matmul
from llmtrain.linear.operand import Operand, Packed, Reach
from llmtrain.linear.sparse import SparseMatmul, plain_values
from llmtrain.ops.block_sparse import (
    block_dgrad,
    block_fprop,
    block_index,
    block_pack_,
    block_values,
    block_wgrad,
)
from llmtrain.ops.semi import (
    LIBRARIES,
    NAMES,
    compress_once,
    fits_semi,
    semi_meta,
    semi_product,
    semi_repack_,
)

BLOCKS = "blocks"


class _Side:
    """One direction of a 2:4 weight: how its values are packed for a library.

    kept: bool [out, in]; turned: the transposed weight, for the gradient of the input. Metadata are
    made here, once, and then only values are packed; where cuSPARSELt's layout is not the expected
    one, it packs the masked weight anew.
    """

    def __init__(self, kept: Tensor, turned: bool, library: str) -> None:
        self.kept, self.turned = kept, turned
        self.meta: Tensor | None = None
        self.packed: Tensor | None = None
        if library == "cutlass":
            self.meta = semi_meta(kept, turned)
            rows, words = self.meta.shape
            self.packed = kept.new_empty(rows, words * 8, dtype=torch.bfloat16)
            self._values = self.packed
        elif (found := compress_once(kept, turned)) is not None:
            self.packed, self._values = found

    def pack(self, weight: Tensor) -> Tensor:
        """The operand of ``semi_product``."""
        if self.packed is None:
            dense = torch.where(self.kept, weight, 0.0).to(torch.bfloat16)
            return torch._cslt_compress(dense.t().contiguous() if self.turned else dense)
        semi_repack_(self._values, weight, self.kept, self.turned)
        return self.packed


class SemiMatmul(MaskedMatmul):
    """``MaskedMatmul`` in bfloat16 for masks with at most two of four kept along the inputs.

    The gradient of the input is sparse too where two of four are kept along the outputs, as
    transposable masks and SLoPe's second one (``back``) have it; else it is dense, and that of the
    weight always is. A scale multiplies results after they were rounded. library: of
    ``llmtrain.ops.semi``.
    """

    def __init__(
        self, inner: Matmul, mask: Mask, back: Mask | None = None, library: str = LIBRARIES[0]
    ) -> None:
        assert inner.dtype == torch.bfloat16 and not inner.packs
        super().__init__(inner, mask, back)
        self.name = f"{inner.name}, 2:4 by {NAMES[library]}"
        kept = mask.box((0, 0), mask.shape).contiguous()
        second = kept if back is None else back.box((0, 0), back.shape).contiguous()
        self._forward = _Side(kept, False, library)
        self._backward = _Side(second, True, library) if fits_semi(second, True) else None

    def operand(self, weight: Tensor, reach: Reach = ALONE) -> Packed:
        weight = weight.detach().contiguous()
        if self._backward is not None:
            return Packed(self._forward.pack(weight), None, self._backward.pack(weight))
        kept = self.mask if self.back is None else self.back
        dense = kept.zero_(weight.to(torch.bfloat16, copy=True))
        return Packed(self._forward.pack(weight), None, dense)

    def fprop(self, x: Operand, weight: Operand, bias: Tensor | None, scale: float = 1.0) -> Tensor:
        y = semi_product(plain_values(x), plain_values(weight), self._forward.meta)
        y = y if scale == 1.0 else y.mul_(scale)
        return y if bias is None else y.add_(bias.to(y.dtype))

    def dgrad(self, grad: Operand, weight: Operand, scale: float = 1.0) -> Tensor:
        assert isinstance(weight, Packed) and weight.turned is not None
        if self._backward is None:
            return self.inner.dgrad(plain_values(grad), weight.turned, scale)
        dx = semi_product(plain_values(grad), weight.turned, self._backward.meta)
        return dx if scale == 1.0 else dx.mul_(scale)


class BlockMatmul(MaskedMatmul):
    """``MaskedMatmul`` in bfloat16 by products with the kept tiles of 64 x 64 alone."""

    def __init__(self, inner: Matmul, mask: Mask) -> None:
        assert inner.dtype == torch.bfloat16 and not inner.packs
        super().__init__(inner, mask)
        self.name = f"{inner.name}, blocks"
        self._index = block_index(mask.kept, mask.block, mask.shape)
        self._values = block_values(self._index)

    def operand(self, weight: Tensor, reach: Reach = ALONE) -> Packed:
        return Packed(block_pack_(self._values, weight.detach().contiguous(), self._index))

    def fprop(self, x: Operand, weight: Operand, bias: Tensor | None, scale: float = 1.0) -> Tensor:
        bias = None if bias is None else bias.detach().to(self.dtype)
        return block_fprop(plain_values(x), plain_values(weight), self._index, bias, scale)

    def dgrad(self, grad: Operand, weight: Operand, scale: float = 1.0) -> Tensor:
        return block_dgrad(plain_values(grad), plain_values(weight), self._index, scale)

    def wgrad(
        self, grad: Operand, x: Operand, into: Tensor | None = None, scale: float = 1.0
    ) -> Tensor:
        if self.dense_gradients:
            return super().wgrad(grad, x, into, scale)
        return block_wgrad(plain_values(grad), plain_values(x), self._index, into, scale)


def sparse_matmul(
    inner: Matmul, mask: Mask, back: Mask | None = None, kind: str = ""
) -> MaskedMatmul:
    """The sparse product ``kind`` of a mask: a library of 2:4 products or ``BLOCKS`` on a GPU.

    Without a kind, the CPU's. Where there is none (a packed number format, a second mask on a CPU),
    dense with zeros.
    """
    if inner.packs:
        return MaskedMatmul(inner, mask, back)
    if kind in LIBRARIES:
        return SemiMatmul(inner, mask, back, kind)
    if kind == BLOCKS:
        assert back is None
        return BlockMatmul(inner, mask)
    if back is not None or mask.kept.is_cuda:
        return MaskedMatmul(inner, mask, back)
    return SparseMatmul(inner, mask)
