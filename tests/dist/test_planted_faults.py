"""The layout tests notice the silent bugs of the field: each is planted, and must be caught."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.layout_runs import alone, assert_same, case, train_steps
from helpers.ranks import RankError, run_ranks

from llmtrain.linear import function
from llmtrain.loss import vocabulary
from llmtrain.model import attention, norm
from llmtrain.parallel import collectives, tensor
from llmtrain.train import module

WHAT = case(steps=2, qk_norm="head", attention_out_bias=True, tie_embeddings=True)


def _no_gradient_sum(patch: pytest.MonkeyPatch) -> None:
    """The gradients of norms and row biases stay each rank's own part."""

    def keep(params: list[Any], group: Any) -> None:
        for param in params:
            if tensor._is_partial(param.grad):
                part = param.grad.to_local()
                mesh, placements = param.device_mesh, param.placements
                param.grad = tensor.DTensor.from_local(part, mesh, placements, run_check=False)

    patch.setattr(module, "finish_gradients", keep)


def _scaled_by_degree(patch: pytest.MonkeyPatch) -> None:
    """A sum that every rank makes of what is already whole."""
    real = function.start_reduce_scatter

    def twice(x: Any, group: Any) -> Any:
        return real(x * group.size(), group)

    patch.setattr(function, "start_reduce_scatter", twice)


def _replicated_gather(patch: pytest.MonkeyPatch) -> None:
    """The gather before the head has a slice for backward instead of a reduce-scatter."""
    patch.setattr(tensor, "gather_rows", collectives.gather_rows_replicated)


def _loss_of_own_words(patch: pytest.MonkeyPatch) -> None:
    """Label smoothing over this rank's part of the vocabulary."""
    real = torch.stack

    def local(parts: Any, dim: int) -> Any:
        scores = list(parts)
        scores[-1] = scores[-1] * 0.5
        return real(scores, dim)

    patch.setattr(vocabulary.torch, "stack", local)


def _whole_head_norm(patch: pytest.MonkeyPatch) -> None:
    """q and k norms taken for replicated: their gradients are not summed over heads."""
    real = norm.Norm

    def unmarked(*args: Any, partial: bool = False) -> Any:
        return real(*args)

    patch.setattr(attention, "Norm", unmarked)


FAULTS = [
    _no_gradient_sum,
    _scaled_by_degree,
    _replicated_gather,
    _loss_of_own_words,
    _whole_head_norm,
]


@pytest.mark.dist
@pytest.mark.parametrize("plant", FAULTS, ids=lambda f: f.__name__.strip("_"))
def test_a_planted_fault_is_caught(plant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = alone(WHAT)
    plant(monkeypatch)
    results = run_ranks(2, lambda rank: train_steps(rank, 2, WHAT, {"tensor": 2}))
    with pytest.raises(AssertionError) as caught:
        for ours in results:
            assert_same(ours, expected)
    assert not isinstance(caught.value, RankError)


@pytest.mark.dist
def test_without_a_fault_nothing_is_caught() -> None:
    for ours in run_ranks(2, lambda rank: train_steps(rank, 2, WHAT, {"tensor": 2})):
        assert_same(ours, alone(WHAT))
