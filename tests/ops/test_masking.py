"""Masks on dense weights: references against brute force; tests/gpu runs the kernels on them."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from llmtrain.ops.masking import (
    mask_apply_,
    masked_adamw_,
    patterns_24,
    transposable_mask,
)
from llmtrain.ops.sparse import expand
from llmtrain.ops.sparse_update import Rule
from llmtrain.sparsity import best_kept, parse_granularity


def test_the_search_finds_what_brute_force_finds() -> None:
    assert len(patterns_24(torch.device("cpu")).unique()) == 90
    scores = torch.rand(12, 20, generator=torch.Generator().manual_seed(1))
    kept = transposable_mask(scores)
    assert torch.equal(kept, best_kept(parse_granularity("2:4t"), scores, 0.5))
    ties = torch.randint(0, 3, (16, 32), generator=torch.Generator().manual_seed(2)).float()
    assert torch.equal(
        transposable_mask(ties), best_kept(parse_granularity("2:4t"), ties, 0.5)
    )  # of equal sums the same
    tile = scores[4:8, 8:12]
    best = 0.0
    for cells in combinations(range(16), 8):
        mask = torch.zeros(16, dtype=torch.bool)
        mask[list(cells)] = True
        mask = mask.view(4, 4)
        if (mask.sum(0) == 2).all() and (mask.sum(1) == 2).all():
            best = max(best, float(tile[mask].sum()))
    assert float(tile[kept[4:8, 8:12]].sum()) == pytest.approx(best)


@pytest.mark.parametrize("block", [(1, 1), (4, 4), (3, 8)], ids=str)
def test_what_is_pruned_is_plus_zero(block: tuple[int, int]) -> None:
    gen = torch.Generator().manual_seed(2)
    x = -torch.rand(13, 21, generator=gen)
    kept = torch.rand(-(-13 // block[0]), -(-21 // block[1]), generator=gen) < 0.5
    mask, before = expand(kept, block, x.shape), x.clone()
    assert mask_apply_(x, kept, block) is x
    assert torch.equal(x[mask], before[mask])
    assert (x[~mask] == 0).all() and not torch.signbit(x[~mask]).any()


def test_adamw_under_a_mask_is_torchs_on_masked_gradients() -> None:
    gen = torch.Generator().manual_seed(3)
    kept = torch.rand(4, 3, generator=gen) < 0.5
    mask = expand(kept, (4, 8), (13, 21))
    weight = torch.randn(13, 21, generator=gen) * mask
    exact = torch.nn.Parameter(weight.double())
    rule = Rule(0.02, (0.9, 0.95), 0.1)
    optimizer = torch.optim.AdamW([exact], lr=0.02, betas=(0.9, 0.95), weight_decay=0.1)
    moments = (torch.zeros_like(weight), torch.zeros_like(weight))
    for step in range(1, 4):
        grad = torch.randn(13, 21, generator=gen)
        exact.grad = grad.double() * mask
        optimizer.step()
        masked_adamw_(weight, grad, moments, (kept, (4, 8)), rule, step)
    torch.testing.assert_close(weight.double(), exact.detach(), atol=1e-6, rtol=1e-5)
    for x in (weight, *moments):
        assert (x[~mask] == 0).all() and not torch.signbit(x[~mask]).any()
