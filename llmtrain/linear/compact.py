"""Kept weights without their zeros: how they lie in memory, and the products that read them.

A layer with a static mask may hold the values of kept blocks alone: weight, gradient and moments
shrink with the density. ``Blocks`` keeps them in the order of the mask, and products are dense
ones of a weight that is spread out for the moment; ``Tiles`` keeps them as the sparse products of
``llmtrain.ops.sparse`` read them. Either way the numbers are those of a dense weight with zeros.
"""

from __future__ import annotations

from functools import cached_property
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor

from llmtrain.linear.masked import Mask, MaskedMatmul, packed
from llmtrain.linear.matmul import ALONE, Matmul
from llmtrain.linear.operand import Operand, Packed, Reach
from llmtrain.linear.sparse import SparseMatmul, plain_values
from llmtrain.ops import Packed as Tiled
from llmtrain.ops import copy_across, gather_tiles, pack, sparse_wgrad, unpack


class Compact(Protocol):
    """Where the kept values of a matrix ``shape`` [rows, columns] lie."""

    shape: tuple[int, int]

    def gather(self, dense: Tensor) -> Tensor:
        """The kept values of ``dense``, a copy; zeros where a block sticks out of the matrix."""
        ...

    def spread(self, values: Tensor) -> Tensor:
        """The matrix of kept ``values``, a copy, with +0.0 elsewhere."""
        ...

    def matmul(self, inner: Matmul, mask: Mask, back: Mask | None) -> MaskedMatmul:
        """Products like ``MaskedMatmul``'s that read values and give gradients of values."""
        ...


class Blocks:
    """Values [kept blocks, block rows, block columns] ([kept] of single weights), row by row."""

    def __init__(self, mask: Mask) -> None:
        self.shape, self.block = mask.shape, mask.block
        self._grid = tuple(mask.kept.shape)
        self._index = mask.kept.flatten().nonzero().flatten().int()

    @cached_property
    def _padding(self) -> tuple[int, int, int, int]:
        (high, wide), (rows, columns) = self.block, self.shape
        return (0, self._grid[1] * wide - columns, 0, self._grid[0] * high - rows)

    def gather(self, dense: Tensor) -> Tensor:
        if self.block == (1, 1):
            return dense.flatten().index_select(0, self._index)
        (high, wide), (down, across) = self.block, self._grid
        tiles = F.pad(dense, self._padding).view(down, high, across, wide).transpose(1, 2)
        index = self._index.long()
        # Indexing keeps the order in memory, which optimizers' kernels go by.
        return tiles[index // across, index % across].contiguous()

    def spread(self, values: Tensor) -> Tensor:
        (high, wide), (down, across), (rows, columns) = self.block, self._grid, self.shape
        flat = values.new_zeros(down * across, *values.shape[1:])
        flat.index_copy_(0, self._index.long(), values + 0.0)
        if self.block == (1, 1):
            return flat.view(rows, columns)
        tiles = flat.view(down, across, high, wide).transpose(1, 2)
        dense = tiles.reshape(down * high, across * wide)
        return dense[:rows, :columns].contiguous()

    def matmul(self, inner: Matmul, mask: Mask, back: Mask | None) -> MaskedMatmul:
        return SpreadMatmul(inner, mask, back, self)


class Tiles:
    """Values [tiles, width, height] of ``Packed`` for sparse products, which share its memory."""

    def __init__(self, dense: Tensor, mask: Mask) -> None:
        self.shape = mask.shape
        self.index: Tiled = pack(dense, mask.kept, mask.block)

    def gather(self, dense: Tensor) -> Tensor:
        return gather_tiles(dense, self.index)

    def spread(self, values: Tensor) -> Tensor:
        return unpack(values, self.index)

    def matmul(self, inner: Matmul, mask: Mask, back: Mask | None) -> MaskedMatmul:
        if inner.packs or back is not None:
            return SpreadMatmul(inner, mask, back, self)
        return TileMatmul(inner, mask, self.index)


class SpreadMatmul(MaskedMatmul):
    """Dense products of kept values that are spread out for each product and forgotten again."""

    def __init__(self, inner: Matmul, mask: Mask, back: Mask | None, compact: Compact) -> None:
        super().__init__(inner, mask, back)
        self.compact = compact

    def operand(self, weight: Tensor, reach: Reach = ALONE) -> Packed:
        return packed(self.inner.operand(self.compact.spread(weight.detach()), reach))

    def wgrad(
        self, grad: Operand, x: Operand, into: Tensor | None = None, scale: float = 1.0
    ) -> Tensor:
        assert not self.dense_gradients
        product = self.inner.wgrad(self.open(grad), self.open(x), None, scale)
        values = self.compact.gather(product)
        return values if into is None else into.add_(values)


class TileMatmul(SparseMatmul):
    """Sparse products whose packed values are the parameter itself."""

    def operand(self, weight: Tensor, reach: Reach = ALONE) -> Packed:
        assert weight.data_ptr() == self.index.values.data_ptr()
        copy_across(self.index)
        return Packed(self.index.values, None, self.index.backward.values)

    def wgrad(
        self, grad: Operand, x: Operand, into: Tensor | None = None, scale: float = 1.0
    ) -> Tensor:
        assert not self.dense_gradients
        values = sparse_wgrad(plain_values(grad), plain_values(x), self.index)
        values = values if scale == 1.0 else values.mul_(scale)
        return values if into is None else into.add_(values)


def compact_weight(weight: Tensor, mask: Mask, sparse: bool) -> tuple[Compact, Tensor]:
    """Where the kept values of ``weight`` [rows, columns] lie, and these values.

    sparse: for sparse products, see ``Tiles``.
    """
    if sparse:
        tiles = Tiles(weight.detach(), mask)
        return tiles, tiles.index.values
    blocks = Blocks(mask)
    return blocks, blocks.gather(weight.detach())
