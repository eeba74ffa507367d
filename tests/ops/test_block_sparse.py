"""Block-sparse products and their index, against float64 with a dense mask."""

from __future__ import annotations

import pytest
import torch

from llmtrain.ops.block_sparse import (
    block_dgrad,
    block_fprop,
    block_index,
    block_pack_,
    block_values,
    block_wgrad,
    fits_blocks,
)
from llmtrain.ops.sparse import expand

CASES = pytest.mark.parametrize(
    ("shape", "block"), [((192, 256), (64, 64)), ((200, 136), (64, 64)), ((136, 264), (128, 64))]
)


@CASES
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_products(shape: tuple[int, int], block: tuple[int, int], density: float) -> None:
    gen = torch.Generator().manual_seed(7)
    grid = (-(-shape[0] // block[0]), -(-shape[1] // block[1]))
    kept = torch.rand(grid, generator=gen) < density
    index = block_index(kept, block, shape)
    weight = torch.randn(shape, generator=gen)
    weight[0, 0] = -0.0
    values = block_pack_(block_values(index), weight, index)
    assert not torch.signbit(values[values == 0]).any()
    mask = expand(kept, block, shape)
    dense = torch.where(mask, weight.bfloat16().double(), 0.0)
    x, dy = (torch.randn(37, n, generator=gen).bfloat16() for n in shape[::-1])
    bias = torch.randn(shape[0], generator=gen).bfloat16()
    pairs = [
        (block_fprop(x, values, index, bias, 0.3), 0.3 * x.double() @ dense.t() + bias.double()),
        (block_dgrad(dy, values, index, 0.3), 0.3 * dy.double() @ dense),
    ]
    for ours, reference in pairs:
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours.double(), reference, atol=0.05, rtol=2**-7)
    into = torch.ones(shape)
    dw = block_wgrad(dy, x, index, into, 0.3)
    assert dw is into
    reference = torch.where(mask, 0.3 * dy.double().t() @ x.double(), 0.0)
    torch.testing.assert_close(dw.double() - 1, reference, atol=1e-5, rtol=1e-5)
    assert torch.equal(block_wgrad(dy, x, index)[~mask], torch.zeros_like(weight)[~mask])


@CASES
def test_both_directions_have_the_same_tiles(
    shape: tuple[int, int], block: tuple[int, int]
) -> None:
    """What a kernel walks: bands of outputs forward, of inputs backward, and their values."""
    grid = (-(-shape[0] // block[0]), -(-shape[1] // block[1]))
    kept = torch.rand(grid, generator=torch.Generator().manual_seed(8)) < 0.5
    index = block_index(kept, block, shape)
    tiles = list(zip(index.rows_of.tolist(), index.cols_of.tolist(), strict=True))
    for side, turned in ((index.forward, False), (index.backward, True)):
        found = []
        for band, (start, stop) in enumerate(
            zip(side.starts[:-1].tolist(), side.starts[1:].tolist(), strict=True)
        ):
            for i in range(start, stop):
                pair = (band, int(side.others[i]))
                found.append(pair[::-1] if turned else pair)
                assert tiles[int(side.place[i])] == found[-1]
        assert sorted(found) == tiles and len(set(found)) == index.tiles


def test_which_masks_fit() -> None:
    assert fits_blocks((192, 136), (64, 128))
    assert not fits_blocks((192, 132), (64, 64))
    assert not fits_blocks((192, 256), (32, 64))
