"""The kernels of sparse training on a GPU against their references on the CPU."""

from __future__ import annotations

import pytest
import torch

from llmtrain.ops.masking import (
    mask_apply_,
    mask_apply_reference_,
    masked_adamw_,
    masked_adamw_reference_,
    transposable_mask,
    transposable_mask_reference,
)
from llmtrain.ops.sparse_update import Rule
from llmtrain.sparsity import best_kept, parse_granularity

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
BLOCKS = pytest.mark.parametrize("block", [(1, 1), (4, 4), (64, 64)], ids=str)


def kept_blocks(rows: int, cols: int, block: tuple[int, int]) -> torch.Tensor:
    gen = torch.Generator().manual_seed(rows + cols)
    return torch.rand(-(-rows // block[0]), -(-cols // block[1]), generator=gen) < 0.5


@BLOCKS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_mask_is_applied(block: tuple[int, int], dtype: torch.dtype) -> None:
    x = -torch.rand(131, 203).to(dtype)
    kept = kept_blocks(131, 203, block)
    ours = mask_apply_(x.cuda(), kept.cuda(), block).cpu()
    expected = mask_apply_reference_(x, kept, block)
    assert torch.equal(ours, expected) and torch.equal(torch.signbit(ours), torch.signbit(expected))


def test_the_search_finds_the_best_pattern() -> None:
    scores = torch.rand(256, 516, generator=torch.Generator().manual_seed(4))
    assert torch.equal(transposable_mask(scores.cuda()).cpu(), transposable_mask_reference(scores))
    ties, both = scores.mul(3).round(), parse_granularity("2:4t")
    assert torch.equal(best_kept(both, ties.cuda(), 0.5).cpu(), best_kept(both, ties, 0.5))


@BLOCKS
def test_adamw_under_a_mask(block: tuple[int, int]) -> None:
    gen, kept = torch.Generator().manual_seed(5), kept_blocks(131, 203, block)
    weight = mask_apply_(torch.randn(131, 203, generator=gen), kept, block)
    ours, here = [[weight.clone(), *(torch.zeros(131, 203) for _ in range(2))] for _ in range(2)]
    ours = [x.cuda() for x in ours]
    rule = Rule(0.02, (0.9, 0.95), 0.1)
    for step in range(1, 4):
        grad = torch.randn(131, 203, generator=gen)
        masked_adamw_(ours[0], grad.cuda(), (ours[1], ours[2]), (kept.cuda(), block), rule, step)
        masked_adamw_reference_(here[0], grad, (here[1], here[2]), (kept, block), rule, step)
    for a, b in zip(ours, here, strict=True):
        torch.testing.assert_close(a.cpu(), b, atol=1e-6, rtol=1e-5)
