"""The three products with a weight of which only some blocks are kept.

A mask is ``kept``, bool [ceil(rows / bh), ceil(cols / bw)], with its block shape (bh, bw); (1, 1)
is unstructured. ``pack`` sorts the kept weights of [rows, cols] once into what the kernels read;
``repack`` takes over new values after an optimizer step; ``sparse_fprop``, ``sparse_dgrad`` and
``sparse_wgrad`` are the products of a linear layer.

Blocks are cut into tiles of at most 4 x 4, and both directions have a copy of the values: a band
of 4 rows reuses each loaded input four times, which is what makes 4 x 4 and 8 x 2 blocks fast on
processors while single weights wait for the cache (Pool et al. 2023, 2306.16601, find the same).
Values are float32 whatever the dtype of the inputs, and so are all sums. Zeros are canonical: no
-0.0 is ever packed or unpacked, since other software counts it as a weight.

Elsewhere than on a CPU with the compiled library, the products are dense with masked weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd

import torch
import torch.nn.functional as F
from torch import Tensor

from llmtrain.ops.native import kernels, usable

# Columns whose panels fit into a first cache of 32 KiB, by the height of the bands: fewer rows
# take more tokens (csrc/cpu/sparse.cpp).
CHUNK = {4: 256, 2: 128, 1: 64}


def count_runs(rows: int, columns: int, height: int) -> int:
    """How many runs of tiles ``Side.starts`` tells apart: chunks of columns times bands."""
    return -(-columns // CHUNK[height]) * -(-rows // height)


@dataclass(frozen=True)
class Side:
    """A sparse matrix [rows, columns] as the kernels read it in one direction.

    starts: [chunks * bands + 1] int32, where the tiles of a chunk of columns and a band of
    ``height`` rows begin. columns_of: [tiles] int32, a tile's first column, counted from its
    chunk's. values: [tiles, width, height] float32, 0 where a tile sticks out of the matrix.
    """

    rows: int
    columns: int
    height: int
    width: int
    starts: Tensor
    columns_of: Tensor
    values: Tensor

    @property
    def layout(self) -> list[int]:
        """The sizes, as the kernels take them."""
        return [self.rows, self.columns, self.height, self.width, CHUNK[self.height]]

    @property
    def grid(self) -> tuple[int, int]:
        """How many tiles would cover the matrix, down and across."""
        return -(-self.rows // self.height), -(-self.columns // self.width)

    def places(self) -> tuple[Tensor, Tensor]:
        """Band and column of each tile within ``grid``, int64."""
        bands = self.grid[0]
        counts = self.starts.diff()
        runs = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
        first = runs // max(bands, 1) * CHUNK[self.height]
        return runs % max(bands, 1), (first + self.columns_of) // self.width


@dataclass(frozen=True)
class Packed:
    """The kept weights of a matrix ``shape`` [rows, cols], for both directions.

    kept, block: the mask. forward: the matrix; its ``values`` are the packed values that
    ``sparse_wgrad`` returns the gradient of. backward: the transposed matrix. place: [tiles]
    int32, where tile i of ``forward`` lies in ``backward``.
    """

    shape: tuple[int, int]
    block: tuple[int, int]
    kept: Tensor
    forward: Side
    backward: Side
    place: Tensor

    @property
    def values(self) -> Tensor:
        """The packed values [tiles, tile width, tile height], float32."""
        return self.forward.values

    def bytes(self) -> int:
        """Memory of values, their transposed copy and the indices."""
        parts = [self.place, self.kept]
        for side in (self.forward, self.backward):
            parts += [side.starts, side.columns_of, side.values]
        return sum(part.numel() * part.element_size() for part in parts)


def expand(kept: Tensor, block: tuple[int, int], shape: Sequence[int]) -> Tensor:
    """The mask ``kept`` of blocks ``block`` as bool [rows, cols] = ``shape``."""
    rows, cols = shape
    full = kept.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return full[:rows, :cols]


def masked(weight: Tensor, kept: Tensor, block: tuple[int, int]) -> Tensor:
    """``weight`` [rows, cols] with zeros outside the mask; no -0.0 anywhere."""
    return torch.where(expand(kept, block, weight.shape), weight, 0.0) + 0.0


def _sort(tiles: Tensor, height: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Kept ``tiles`` [down, across] in the order of the kernels: starts, columns_of, and the
    tiles' bands and columns in ``tiles``."""
    per = CHUNK[height] // width
    down, across = tiles.shape
    chunks = -(-across // per)
    cut = F.pad(tiles, (0, chunks * per - across)).view(down, chunks, per).transpose(0, 1)
    chunk, band, local = cut.nonzero(as_tuple=True)
    ends = cut.sum(-1).flatten().cumsum(0).int()
    starts = torch.cat((ends.new_zeros(1), ends))
    return starts, (local * width).int(), band, chunk * per + local


def pack(weight: Tensor, kept: Tensor, block: tuple[int, int]) -> Packed:
    """Sort the kept weights of ``weight`` [rows, cols] for the three products.

    kept: bool [ceil(rows / bh), ceil(cols / bw)] for ``block`` = (bh, bw). Raises ValueError for
    a mask of another shape.
    """
    rows, cols = weight.shape
    blocks = (-(-rows // block[0]), -(-cols // block[1]))
    if tuple(kept.shape) != blocks:
        raise ValueError(
            f"a mask of {kept.shape[0]} x {kept.shape[1]} blocks of {block[0]} x {block[1]} for a "
            f"weight {rows} x {cols}, which has {blocks[0]} x {blocks[1]}"
        )
    height, width = gcd(block[0], 4), gcd(block[1], 4)
    down, across = -(-rows // height), -(-cols // width)
    tiles = expand(kept, (block[0] // height, block[1] // width), (down, across))
    starts, columns_of, band, column = _sort(tiles, height, width)
    turned = _sort(tiles.t(), width, height)
    number = torch.zeros(tiles.shape, dtype=torch.int32, device=weight.device)
    number[band, column] = torch.arange(len(band), dtype=torch.int32, device=weight.device)
    place = torch.empty_like(columns_of)
    order = number[turned[3], turned[2]].long()
    place[order] = torch.arange(len(band), dtype=torch.int32, device=weight.device)
    values = torch.empty(len(band), width, height, dtype=torch.float32, device=weight.device)
    forward = Side(rows, cols, height, width, starts, columns_of, values)
    backward = Side(
        cols, rows, width, height, turned[0], turned[1], values.new_empty(len(band), height, width)
    )
    packed = Packed((rows, cols), block, kept, forward, backward, place)
    repack(packed, weight)
    return packed


def _tiles_of(dense: Tensor, side: Side) -> Tensor:
    """The kept tiles of ``dense`` [rows, columns], [tiles, width, height]."""
    down, across = side.grid
    padding = (0, across * side.width - side.columns, 0, down * side.height - side.rows)
    tiles = F.pad(dense, padding).view(down, side.height, across, side.width)
    return tiles.permute(0, 2, 3, 1)[side.places()]


def unpack(values: Tensor, packed: Packed) -> Tensor:
    """Packed ``values`` as a dense [rows, cols] of the same dtype, 0 elsewhere."""
    side = packed.forward
    down, across = side.grid
    tiles = values.new_zeros(down, across, side.width, side.height)
    tiles[side.places()] = values + 0.0
    dense = tiles.permute(0, 3, 1, 2).reshape(down * side.height, across * side.width)
    return dense[: side.rows, : side.columns].contiguous()


def gather_tiles(dense: Tensor, packed: Packed) -> Tensor:
    """What ``unpack`` makes ``dense`` [rows, cols] of: its kept values, zeros beyond its ends."""
    # Indexing keeps the order in memory, which optimizers' kernels go by.
    return _tiles_of(dense, packed.forward).contiguous()


def copy_across(packed: Packed) -> None:
    """Make the transposed copy hold what ``packed.values`` hold."""
    packed.backward.values.index_copy_(0, packed.place.long(), packed.values.transpose(1, 2))


def repack_reference(packed: Packed, weight: Tensor) -> None:
    """``repack`` in plain PyTorch."""
    packed.values.copy_(_tiles_of(weight.detach().float(), packed.forward) + 0.0)
    copy_across(packed)


def repack(packed: Packed, weight: Tensor) -> None:
    """Take the values of ``weight`` [rows, cols] over, in place; the mask stays."""
    side = packed.forward
    source = weight.detach().float()
    if not usable(source):
        repack_reference(packed, source)
        return
    index = (side.starts, side.columns_of, packed.place, side.layout)
    kernels().sparse_repack_(side.values, packed.backward.values, source.contiguous(), *index)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def sparse_fprop_reference(x: Tensor, packed: Packed) -> Tensor:
    """``sparse_fprop`` in plain PyTorch."""
    wide = _wide(x)
    return (x.to(wide) @ unpack(packed.values, packed).to(wide).t()).to(x.dtype)


def sparse_dgrad_reference(dy: Tensor, packed: Packed) -> Tensor:
    """``sparse_dgrad`` in plain PyTorch."""
    wide = _wide(dy)
    return (dy.to(wide) @ unpack(packed.values, packed).to(wide)).to(dy.dtype)


def sparse_wgrad_reference(dy: Tensor, x: Tensor, packed: Packed) -> Tensor:
    """``sparse_wgrad`` in plain PyTorch."""
    wide = _wide(dy)
    return _tiles_of(dy.to(wide).t() @ x.to(wide), packed.forward)


def _product(x: Tensor, side: Side) -> Tensor:
    out: Tensor = kernels().sparse_product(
        x.contiguous(), side.starts, side.columns_of, side.values, side.layout
    )
    return out


def sparse_fprop(x: Tensor, packed: Packed) -> Tensor:
    """y = x W^T: [n, rows] for ``x`` [n, cols] of float32 or bfloat16; y has x's dtype."""
    return _product(x, packed.forward) if usable(x) else sparse_fprop_reference(x, packed)


def sparse_dgrad(dy: Tensor, packed: Packed) -> Tensor:
    """dx = dy W: [n, cols] for ``dy`` [n, rows] of float32 or bfloat16; dx has dy's dtype."""
    return _product(dy, packed.backward) if usable(dy) else sparse_dgrad_reference(dy, packed)


def sparse_wgrad(dy: Tensor, x: Tensor, packed: Packed) -> Tensor:
    """The gradient of ``packed.values``, float32, like them [tiles, tile width, tile height].

    dy [n, rows] and x [n, cols] of one dtype. ``unpack`` makes it dense: dy^T x at the kept
    blocks.
    """
    if not usable(dy) or x.dtype != dy.dtype:
        return sparse_wgrad_reference(dy, x, packed)
    side = packed.forward
    out: Tensor = kernels().sparse_gradient(
        dy.contiguous(), x.contiguous(), side.starts, side.columns_of, side.layout
    )
    return out
