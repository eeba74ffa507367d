"""Masked products: y = x (W * M)^T with any number format, and gradients at the mask only.

A ``Mask`` is a pattern of kept blocks. ``MaskedMatmul`` puts one around another matmul, so that
sparse layers run in every number format and under every layout. The products are those of the
dense format on weights whose pruned values are zeros: what is computed is exact, and no faster.
Zeros are +0.0: sparse kernels take -0.0 for a value.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from llmtrain.linear.matmul import ALONE, Matmul
from llmtrain.linear.operand import Operand, Packed, Reach

_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True, eq=False)
class Mask:
    """Which blocks of a matrix are kept.

    kept: bool [ceil(rows / block rows), ceil(columns / block columns)]; shape: of the matrix.
    Blocks at the lower and right edges may be cut off by the matrix' end.
    """

    kept: Tensor
    block: tuple[int, int]
    shape: tuple[int, int]

    def __post_init__(self) -> None:
        wanted = tuple(-(-n // b) for n, b in zip(self.shape, self.block, strict=True))
        assert self.kept.dtype == torch.bool and tuple(self.kept.shape) == wanted

    @property
    def density(self) -> float:
        """Share of kept elements."""
        return float(self.box((0, 0), self.shape).double().mean())

    @cached_property
    def _pruned(self) -> Tensor:
        return ~self.kept

    def box(self, offset: tuple[int, int], size: tuple[int, int]) -> Tensor:
        """The mask of the elements of a box, bool ``size``."""
        kept = self.kept
        if self.block == (1, 1):
            return kept[offset[0] : offset[0] + size[0], offset[1] : offset[1] + size[1]]
        rows, columns = (
            torch.arange(first, first + n, device=kept.device) // b
            for first, n, b in zip(offset, size, self.block, strict=True)
        )
        return kept[rows[:, None], columns]

    def part(self, offset: tuple[int, int], size: tuple[int, int]) -> Mask:
        """The mask of a box that cuts no block but at the matrix' end."""
        assert not any(o % b for o, b in zip(offset, self.block, strict=True))
        (top, left), (height, width) = (
            tuple(-(-n // b) for n, b in zip(pair, self.block, strict=True))
            for pair in (offset, size)
        )
        kept = self.kept[top : top + height, left : left + width].contiguous()
        return Mask(kept, self.block, size)

    def to(self, device: torch.device) -> Mask:
        """The same mask on a device."""
        return Mask(self.kept.to(device), self.block, self.shape)

    def zero_(self, x: Tensor) -> Tensor:
        """``x`` [rows, columns] of any dtype with +0.0 where the mask prunes, in place."""
        raw = x.view(torch.uint8) if x.dtype in _FP8 else x
        (rows, columns), (high, wide) = self.shape, self.block
        if self.block == (1, 1):
            raw.masked_fill_(self._pruned, 0)
        elif rows % high or columns % wide or not raw.is_contiguous():
            raw.masked_fill_(~self.box((0, 0), self.shape), 0)
        else:
            blocks = raw.view(rows // high, high, columns // wide, wide)
            blocks.masked_fill_(self._pruned[:, None, :, None], 0)
        return x


class MaskedMatmul:
    """``inner`` on W * M.

    dgrad reads W * M too, or W * M * M' with a second mask ``back`` (SLoPe's double pruning);
    wgrad is zero outside M, unless ``dense_gradients`` is set: growing a mask needs all of it.
    """

    packs = True

    def __init__(self, inner: Matmul, mask: Mask, back: Mask | None = None) -> None:
        self.inner, self.mask, self.back = inner, mask, back
        self.name, self.dtype = f"{inner.name}, masked", inner.dtype
        self.dense_gradients = False

    def __repr__(self) -> str:
        return f"MaskedMatmul({self.name})"

    def operand(self, weight: Tensor, reach: Reach = ALONE) -> Packed:
        masked = self.mask.zero_(weight.detach().clone(memory_format=torch.contiguous_format))
        return packed(self.inner.operand(masked, reach))

    def pack_input(self, x: Tensor, reach: Reach = ALONE, turned: bool = False) -> Packed:
        return packed(self.inner.pack_input(x, reach, turned))

    def pack_grad(self, grad: Tensor, reach: Reach = ALONE, turned: bool = False) -> Packed:
        return packed(self.inner.pack_grad(grad, reach, turned))

    def fprop(self, x: Operand, weight: Operand, bias: Tensor | None, scale: float = 1.0) -> Tensor:
        return self.inner.fprop(self.open(x), self.open(weight), bias, scale)

    def dgrad(self, grad: Operand, weight: Operand, scale: float = 1.0) -> Tensor:
        if self.back is not None:
            weight = self._pruned_again(weight)
        return self.inner.dgrad(self.open(grad), self.open(weight), scale)

    def wgrad(
        self, grad: Operand, x: Operand, into: Tensor | None = None, scale: float = 1.0
    ) -> Tensor:
        product = self.inner.wgrad(self.open(grad), self.open(x), None, scale)
        if not self.dense_gradients:
            self.mask.zero_(product)
        return product if into is None else into.add_(product)

    def open(self, x: Operand) -> Operand:
        """As ``inner`` reads it."""
        if self.inner.packs:
            return x
        assert isinstance(x, Packed) and x.values is not None
        return x.values

    def _pruned_again(self, weight: Operand) -> Packed:
        assert self.back is not None and isinstance(weight, Packed) and weight.values is not None
        values, turned = self.back.zero_(weight.values.clone()), weight.turned
        if turned is not None:
            across = Mask(self.back.kept.t(), self.back.block[::-1], self.back.shape[::-1])
            turned = across.zero_(turned.clone())
        return Packed(values, weight.scale, turned)


def packed(x: Operand) -> Packed:
    """``x`` as a masked format hands it on."""
    return x if isinstance(x, Packed) else Packed(x)
