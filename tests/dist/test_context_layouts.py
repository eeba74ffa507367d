"""A few steps on split sequences against one process, with everything else that can be split."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.layout_runs import Case, alone, assert_same, case, train_steps
from helpers.ranks import RankError, run_ranks
from torch import Tensor

from llmtrain.data.batch import Batch
from llmtrain.ops import first_of_document
from llmtrain.parallel import context_attention, split_batch
from llmtrain.parallel.collectives import all_gather
from llmtrain.parallel.context import join, split
from llmtrain.train import module

PLAIN = case(steps=3, micro=3, tie_embeddings=True, n_kv_heads=1)
LEARNED = case(steps=3, seq_len=24, micro=6, position="learned", dropout=0.1)
HEADS = case(steps=3, seq_len=24, qk_norm="head", micro=6, dropout=0.1)


def _recompute(what: Case, mode: str) -> Case:
    return dataclasses.replace(what, train=(*what.train, ("recompute", mode)))


RING = {"context_method": "ring"}
LAYOUTS: dict[str, tuple[int, Case, dict[str, Any]]] = {
    "CP2": (2, _recompute(PLAIN, "selective"), {"context": 2}),
    "CP2+FSDP2": (4, PLAIN, {"context": 2}),
    "CP2+TP2+SP": (4, HEADS, {"context": 2, "tensor": 2}),
    "CP3": (3, HEADS, {"context": 3}),
    "CP2 ring": (2, _recompute(PLAIN, "selective"), {"context": 2, **RING}),
    "CP2 ring+DP2": (4, PLAIN, {"context": 2, "replicate": 2, **RING}),
    "CP2 ring+TP2": (4, PLAIN, {"context": 2, "tensor": 2, "sequence": False, **RING}),
    "CP3 ring": (3, _recompute(HEADS, "full"), {"context": 3, **RING}),
    "CP4 ring": (4, LEARNED, {"context": 4, **RING}),
}


@pytest.mark.dist
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_few_steps(layout: str) -> None:
    world, what, parallel = LAYOUTS[layout]
    for ours in run_ranks(world, lambda rank: train_steps(rank, world, what, parallel)):
        assert_same(ours, alone(what))


class _SliceBackward(torch.autograd.Function):
    """``gather_sequence`` whose backward keeps this rank's own gradient only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: Any) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return join(all_gather(x[None], group).unbind(0), dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return split(grad, ctx.dim, ctx.group.rank(), ctx.group.size()), None, None


def _unsummed_gradients(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(context_attention, "gather_sequence", _SliceBackward.apply)


def _changed_batch(patch: pytest.MonkeyPatch, change: Callable[[Batch], Batch]) -> None:
    patch.setattr(module, "split_batch", lambda *args: change(split_batch(*args)))


def _positions_from_zero(patch: pytest.MonkeyPatch) -> None:
    def change(batch: Batch) -> Batch:
        index = torch.arange(batch.tokens.shape[1]).expand_as(batch.tokens)
        return dataclasses.replace(batch, positions=index)

    _changed_batch(patch, change)


def _documents_of_the_part(patch: pytest.MonkeyPatch) -> None:
    def change(batch: Batch) -> Batch:
        return dataclasses.replace(batch, first=first_of_document(batch.doc_ids))

    _changed_batch(patch, change)


def _no_documents(patch: pytest.MonkeyPatch) -> None:
    _changed_batch(patch, lambda batch: dataclasses.replace(batch, first=None))


FAULTS = [_unsummed_gradients, _positions_from_zero, _documents_of_the_part, _no_documents]


@pytest.mark.dist
@pytest.mark.parametrize("plant", FAULTS, ids=lambda f: f.__name__.strip("_"))
def test_a_planted_fault_is_caught(plant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    what = dataclasses.replace(PLAIN, steps=2)
    expected = alone(what)
    plant(monkeypatch)
    results = run_ranks(2, lambda rank: train_steps(rank, 2, what, {"context": 2}))
    with pytest.raises(AssertionError) as caught:
        for ours in results:
            assert_same(ours, expected)
    assert not isinstance(caught.value, RankError)
