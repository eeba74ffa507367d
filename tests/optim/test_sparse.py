"""Optimizers on kept weights against torch's on the dense weight with masked gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from llmtrain.linear import Mask, SparseLinear
from llmtrain.ops import Packed, pack, unpack
from llmtrain.ops.sparse import expand
from llmtrain.ops.sparse_update import (
    Rule,
    sparse_adamw_,
    sparse_adamw_reference_,
    sparse_lion_,
    sparse_lion_reference_,
)
from llmtrain.optim import Lion, SparseAdamW, SparseLion

SHAPE = (37, 150)
BLOCKS = pytest.mark.parametrize("block", [(1, 1), (4, 4), (8, 2)], ids=str)


def start(block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weight, kept blocks, mask of the elements."""
    gen = torch.Generator().manual_seed(5)
    grid = [-(-n // b) for n, b in zip(SHAPE, block, strict=True)]
    kept = torch.rand(grid, generator=gen) < 0.4
    return torch.randn(SHAPE, generator=gen), kept, expand(kept, block, SHAPE)


def gather(dense: torch.Tensor, packed: Packed) -> torch.Tensor:
    """Dense values in the packed order."""
    return pack(dense, packed.kept, packed.block).values


@BLOCKS
@pytest.mark.parametrize("fast", [True, False], ids=["fast", "reference"])
@pytest.mark.parametrize("name", ["adamw", "lion"])
def test_updates_are_the_dense_ones_at_the_mask(
    block: tuple[int, int], fast: bool, name: str
) -> None:
    """Five steps in float64 by torch; the dense copy follows, and is left alone elsewhere."""
    weight, kept, mask = start(block)
    packed = pack(weight, kept, block)
    exact = nn.Parameter(weight.double() * mask)
    rule = Rule(lr=0.02, betas=(0.9, 0.95), weight_decay=0.1)
    dense = weight.clone()
    first, second = (torch.zeros_like(packed.values) for _ in range(2))
    options = {"lr": rule.lr, "betas": rule.betas, "weight_decay": rule.weight_decay}
    optimizer = (torch.optim.AdamW if name == "adamw" else Lion)([exact], **options)
    gen = torch.Generator().manual_seed(6)
    for step in range(1, 6):
        grad = torch.randn(SHAPE, generator=gen) * 10.0**-step
        exact.grad = grad.double() * mask
        optimizer.step()
        values = gather(grad, packed)
        if name == "adamw":
            adamw = sparse_adamw_ if fast else sparse_adamw_reference_
            adamw(packed, values, (first, second), rule, step, dense)
        else:
            (sparse_lion_ if fast else sparse_lion_reference_)(packed, values, first, rule, dense)
    torch.testing.assert_close(
        unpack(packed.values, packed).double(), exact.detach(), atol=2e-6, rtol=1e-5
    )
    assert torch.equal(dense[mask], unpack(packed.values, packed)[mask])
    assert torch.equal(dense[~mask], weight[~mask])
    assert torch.equal(packed.backward.values, pack(dense, kept, block).backward.values)
    moment = optimizer.state[exact]["exp_avg"]
    torch.testing.assert_close(unpack(first, packed).double(), moment, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("kind", [SparseAdamW, SparseLion])
def test_a_layer_learns_as_its_dense_twin_and_holds_kept_weights_only(
    kind: type[SparseAdamW] | type[SparseLion],
) -> None:
    """Forward, backward and steps of layer and optimizer; then dense with the moments kept."""
    weight, kept, mask = start((4, 4))
    layer = SparseLinear(weight, Mask(kept, (4, 4), SHAPE), torch.ones(SHAPE[0]))
    twin = nn.Linear(SHAPE[1], SHAPE[0]).double()
    with torch.no_grad():
        twin.weight.copy_(weight * mask)
        twin.bias.fill_(1.0)
    options = {"lr": 1e-3, "weight_decay": 0.1}
    optimizer = kind({layer.values: layer.packed}, **options)
    dense = (torch.optim.AdamW if kind is SparseAdamW else Lion)([twin.weight], **options)
    gen = torch.Generator().manual_seed(7)
    for _ in range(3):
        x, upstream = (torch.randn(2, 9, n, generator=gen) for n in (SHAPE[1], SHAPE[0]))
        leaf, exact = x.clone().requires_grad_(), x.double().requires_grad_()
        y, expected = layer(leaf), twin(exact)
        torch.testing.assert_close(y.double(), expected, atol=1e-4, rtol=1e-4)
        optimizer.zero_grad()
        dense.zero_grad()
        y.backward(upstream)
        expected.backward(upstream.double())
        assert leaf.grad is not None and exact.grad is not None
        torch.testing.assert_close(leaf.grad.double(), exact.grad, atol=1e-4, rtol=1e-4)
        assert twin.weight.grad is not None
        twin.weight.grad *= mask
        optimizer.step()
        dense.step()
    torch.testing.assert_close(layer.dense().double(), twin.weight.detach(), atol=1e-5, rtol=1e-4)
    elements = sum(t.numel() for s in optimizer.state.values() for t in s.values() if t.dim())
    tiles = len(layer.values)
    assert tiles * 16 <= 1.2 * 0.4 * weight.numel() + 500
    assert elements == tiles * 16 * (2 if kind is SparseAdamW else 1)
