"""The balanced split of sequences over ranks, and its collective."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from helpers.ranks import run_ranks
from torch import Tensor

from llmtrain.data.batch import Batch
from llmtrain.parallel.context import gather_sequence, join, local_positions, split, split_batch


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_every_token_has_one_place_and_ranks_have_equal_work(size: int) -> None:
    length = 2 * size * 5
    parts = [local_positions(length, rank, size) for rank in range(size)]
    assert sorted(torch.cat(parts).tolist()) == list(range(length))
    assert {len(part) for part in parts} == {length // size}
    # Under a causal mask a token attends to as many keys as its position + 1.
    assert len({int(part.sum()) for part in parts}) == 1


def test_the_split_of_two_ranks() -> None:
    assert local_positions(8, 0, 2).tolist() == [0, 1, 6, 7]
    assert local_positions(8, 1, 2).tolist() == [2, 3, 4, 5]


@pytest.mark.parametrize(("size", "dim"), [(1, 0), (2, 1), (3, -1), (4, 1)])
def test_join_is_the_inverse_of_split(size: int, dim: int) -> None:
    x = torch.randn(24, 24, 24)
    parts = [split(x, dim, rank, size) for rank in range(size)]
    assert torch.equal(join(parts, dim), x)
    for rank, part in enumerate(parts):
        index = local_positions(24, rank, size)
        assert torch.equal(part, x.index_select(dim, index))


def test_a_length_that_does_not_fit_is_refused() -> None:
    with pytest.raises(AssertionError, match="10 tokens cannot be cut into 4 chunks"):
        split(torch.zeros(10), 0, 0, 2)


@pytest.mark.dist
@pytest.mark.parametrize(
    ("size", "dtype"), [(2, torch.float64), (3, torch.float32), (4, torch.bfloat16)]
)
def test_gather_sequence_and_its_adjoint(size: int, dtype: torch.dtype) -> None:
    shape, dim = (2, 4 * size, 3), 1
    draw = torch.Generator().manual_seed(1)
    whole = torch.randn(shape, generator=draw).to(dtype)
    upstream = torch.randn(size, *shape, generator=draw).to(dtype)

    def body(rank: int) -> tuple[Tensor, Tensor | None]:
        group = dist.group.WORLD
        assert group is not None
        x = split(whole, dim, rank, size).requires_grad_()
        out = gather_sequence(x, dim, group)
        out.backward(upstream[rank])
        return out.detach(), x.grad

    # Added in float32 and rounded once.
    total = upstream.sum(0, dtype=torch.promote_types(dtype, torch.float32)).to(dtype)
    for rank, (out, grad) in enumerate(run_ranks(size, body)):
        assert torch.equal(out, whole)
        assert grad is not None and grad.dtype == dtype
        torch.testing.assert_close(grad, split(total, dim, rank, size))


def _batch() -> Batch:
    draw = torch.Generator().manual_seed(2)
    doc_ids = torch.tensor([[0] * 5 + [1] + [2] * 6, [0] * 9 + [-1] * 3], dtype=torch.int32)
    return Batch(
        tokens=torch.randint(0, 99, (2, 12), generator=draw),
        targets=torch.randint(0, 99, (2, 12), generator=draw),
        weights=torch.rand(2, 12, generator=draw),
        doc_ids=doc_ids,
        positions=torch.arange(12).repeat(2, 1),
        source_ids=torch.tensor([1, 0]),
        sample_ids=torch.tensor([17, 18]),
    )


@pytest.mark.parametrize("size", [2, 3])
def test_the_parts_of_a_batch(size: int) -> None:
    batch = _batch()
    first = torch.tensor([[0] * 5 + [5] + [6] * 6, [0] * 9 + [9] * 3], dtype=torch.int32)
    parts = [split_batch(batch, rank, size, document_mask=True) for rank in range(size)]
    for name in ("tokens", "targets", "weights", "doc_ids", "positions"):
        assert torch.equal(join([getattr(p, name) for p in parts], 1), getattr(batch, name))
    for rank, part in enumerate(parts):
        assert part.first is not None and part.first.dtype == torch.int32
        assert torch.equal(part.first, split(first, 1, rank, size))
        assert torch.equal(part.positions[0], local_positions(12, rank, size))
        assert torch.equal(part.source_ids, batch.source_ids)
        assert torch.equal(part.sample_ids, batch.sample_ids)
        row = part[1:].first
        assert row is not None and torch.equal(row, part.first[1:])
    assert split_batch(batch, 0, size, document_mask=False).first is None
