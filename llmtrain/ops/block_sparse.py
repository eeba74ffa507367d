"""Products with a weight of which only some tiles of 64 x 64 are kept, on tensor cores.

For masks of blocks that are multiples of 64 a side. ``block_index`` sorts a mask's tiles once;
``block_pack_`` takes their values over in bfloat16 after an optimizer step; ``block_fprop``,
``block_dgrad`` and ``block_wgrad`` are the products of a linear layer, bfloat16 with sums in
float32. One copy of the values serves forward and backward. Elsewhere than on a GPU with the
compiled kernels everything runs in plain PyTorch, dense.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from llmtrain.ops.cuda import cuda_kernels, ready
from llmtrain.ops.sparse import expand

TILE = 64


@dataclass(frozen=True)
class Direction:
    """The tiles of a mask by bands of 64 columns of a result.

    starts: [bands + 1], where the tiles of a band begin; others: [tiles], in which 64 columns of
    the input each lies; place: [tiles], which of the packed values it is. All int32.
    """

    starts: Tensor
    others: Tensor
    place: Tensor


@dataclass(frozen=True)
class BlockIndex:
    """The kept tiles of a weight ``shape`` [rows, cols]; both are multiples of 8.

    rows_of, cols_of: [tiles] int32, row after row. forward: bands of outputs; backward: of inputs.
    """

    shape: tuple[int, int]
    rows_of: Tensor
    cols_of: Tensor
    forward: Direction
    backward: Direction

    @property
    def tiles(self) -> int:
        """How many are kept."""
        return self.rows_of.numel()


def fits_blocks(shape: tuple[int, int], block: tuple[int, int]) -> bool:
    """Whether the kernels take masks of such blocks for a weight ``shape``."""
    return not any(b % TILE for b in block) and not any(n % 8 for n in shape)


def _direction(bands: Tensor, others: Tensor, count: int) -> Direction:
    """From the band and the other coordinate of each tile."""
    order = bands.argsort(stable=True)
    ends = torch.bincount(bands, minlength=count).cumsum(0)
    starts = torch.cat((ends.new_zeros(1), ends))
    return Direction(starts.int(), others[order].int(), order.int())


def block_index(kept: Tensor, block: tuple[int, int], shape: tuple[int, int]) -> BlockIndex:
    """Sort the tiles of a mask: bool [ceil(rows / bh), ceil(cols / bw)] for ``block`` (bh, bw)."""
    assert fits_blocks(shape, block)
    down, across = (-(-n // TILE) for n in shape)
    tiles = expand(kept, (block[0] // TILE, block[1] // TILE), (down, across))
    rows, cols = tiles.nonzero(as_tuple=True)
    forward, backward = _direction(rows, cols, down), _direction(cols, rows, across)
    return BlockIndex(shape, rows.int(), cols.int(), forward, backward)


def block_values(index: BlockIndex) -> Tensor:
    """Room for packed values: bfloat16 [tiles, 64, 64]."""
    return torch.empty((index.tiles, TILE, TILE), dtype=torch.bfloat16, device=index.rows_of.device)


def _tiles(x: Tensor, index: BlockIndex) -> Tensor:
    """The kept tiles [tiles, 64, 64] of ``x`` like the weight, zeros where they stick out."""
    rows, cols = index.shape
    padded = F.pad(x, (0, -cols % TILE, 0, -rows % TILE))
    down, across = -(-rows // TILE), -(-cols // TILE)
    grid = padded.view(down, TILE, across, TILE).transpose(1, 2)
    return grid[index.rows_of.long(), index.cols_of.long()]


def _spread(values: Tensor, index: BlockIndex) -> Tensor:
    """The weight [rows, cols] of packed values, zeros elsewhere."""
    rows, cols = index.shape
    down, across = -(-rows // TILE), -(-cols // TILE)
    grid = values.new_zeros(down, across, TILE, TILE)
    grid[index.rows_of.long(), index.cols_of.long()] = values
    return grid.transpose(1, 2).reshape(down * TILE, across * TILE)[:rows, :cols]


def _runs(x: Tensor) -> bool:
    return x.is_cuda and x.dtype == torch.bfloat16 and ready()


def block_pack_(values: Tensor, weight: Tensor, index: BlockIndex) -> Tensor:
    """The kept tiles of ``weight`` [rows, cols], float32 or bfloat16, into ``values`` of
    ``block_values``, which is returned. No -0.0."""
    if not _runs(values) or not weight.is_contiguous():
        return values.copy_(_tiles(weight, index)).add_(0.0)
    cuda_kernels().block_pack_(values, weight, index.rows_of, index.cols_of)
    return values


def block_fprop(
    x: Tensor, values: Tensor, index: BlockIndex, bias: Tensor | None = None, scale: float = 1.0
) -> Tensor:
    """y = scale x W^T + bias: bfloat16 [n, rows] for ``x`` [n, cols] and ``bias`` [rows] in
    bfloat16."""
    if not _runs(x):
        y = scale * (x.float() @ _spread(values, index).float().t())
        return (y if bias is None else y + bias.float()).to(x.dtype)
    return _product(x, values, bias, index.forward, index.shape[0], False, scale)


def block_dgrad(dy: Tensor, values: Tensor, index: BlockIndex, scale: float = 1.0) -> Tensor:
    """dx = scale dy W: bfloat16 [n, cols] for ``dy`` [n, rows]."""
    if not _runs(dy):
        return (scale * (dy.float() @ _spread(values, index).float())).to(dy.dtype)
    return _product(dy, values, None, index.backward, index.shape[1], True, scale)


def _product(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    tiles: Direction,
    width: int,
    turned: bool,
    scale: float,
) -> Tensor:
    indices = (tiles.starts, tiles.others, tiles.place)
    y: Tensor = cuda_kernels().block_product(
        x.contiguous(), values, bias, *indices, width, turned, scale
    )
    return y


def block_wgrad(
    dy: Tensor, x: Tensor, index: BlockIndex, into: Tensor | None = None, scale: float = 1.0
) -> Tensor:
    """scale dy^T x at the kept tiles: float32 [rows, cols], zeros elsewhere; added to ``into``,
    in place, where it is given. dy [n, rows] and x [n, cols] in bfloat16."""
    out = into
    if out is None:
        out = torch.zeros(index.shape, dtype=torch.float32, device=x.device)
    if not _runs(x) or not out.is_contiguous() or out.data_ptr() % 8:
        product = scale * (dy.float().t() @ x.float())
        return out.add_(_spread(_tiles(product, index), index))
    cuda_kernels().block_gradient_(
        out, dy.contiguous(), x.contiguous(), index.rows_of, index.cols_of, scale
    )
    return out
