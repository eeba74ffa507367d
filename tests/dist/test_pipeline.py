"""Pipelines against one process: every schedule, tied and untied, over the other dimensions."""

from __future__ import annotations

import random
from itertools import combinations, pairwise
from typing import Any

import pytest
import torch
from helpers.layout_runs import (
    Case,
    alone,
    assert_same,
    build,
    case,
    make_batch,
    rank_batch,
    train_steps,
)
from helpers.ranks import run_ranks

from llmtrain.eval.generation import Continuation, Sampling, generate
from llmtrain.linear import matmul
from llmtrain.parallel.pipeline import split_layers

# Five layers over two stages, one key/value head.
TIED = case(micro=2, n_layers=5, tie_embeddings=True, n_kv_heads=1)
UNTIED = case(
    micro=2, n_layers=4, position="learned", dropout=0.1, attention_bias=True,
    attention_out_bias=True, mlp_bias=True, norm="layernorm", norm_bias=True,
)  # fmt: skip

LAYOUTS: dict[str, tuple[int, dict[str, Any], Case]] = {
    "PP2": (2, {"pipeline": 2}, TIED),
    "PP2 GPipe": (2, {"pipeline": 2, "pipeline_schedule": "gpipe"}, UNTIED),
    "PP2 interleaved": (2, {"pipeline": 2, "pipeline_schedule": "interleaved"}, TIED),
    "PP2 zero bubble": (2, {"pipeline": 2, "pipeline_schedule": "zero_bubble"}, TIED),
    "PP4": (4, {"pipeline": 4}, UNTIED),
    "PP2+FSDP2": (4, {"pipeline": 2}, TIED),
    "PP2+DP2": (4, {"pipeline": 2, "replicate": 2}, UNTIED),
    "PP2+TP2": (4, {"pipeline": 2, "tensor": 2}, TIED),
    "PP2+TP2 zero bubble": (
        4,
        {"pipeline": 2, "tensor": 2, "pipeline_schedule": "zero_bubble"},
        UNTIED,
    ),
    "PP2+FSDP2 zero bubble": (4, {"pipeline": 2, "pipeline_schedule": "zero_bubble"}, TIED),
    "PP2+DP2 zero bubble": (
        4,
        {"pipeline": 2, "replicate": 2, "pipeline_schedule": "zero_bubble"},
        UNTIED,
    ),
    "PP2+CP2": (4, {"pipeline": 2, "context": 2}, UNTIED),
    "PP2+CP2 zero bubble": (
        4,
        {"pipeline": 2, "context": 2, "pipeline_schedule": "zero_bubble"},
        UNTIED,
    ),
}


@pytest.mark.dist
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_pipeline_is_the_same_run(layout: str) -> None:
    world, parallel, what = LAYOUTS[layout]
    results = run_ranks(world, lambda rank: train_steps(rank, world, what, parallel))
    for ours in results:
        assert_same(ours, alone(what))
    found = {name for ours in results for name in ours.weights}
    assert found == alone(what).weights.keys()


@pytest.mark.dist
def test_every_weight_gradient_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A zero-bubble schedule splits backward; it does not do everything twice."""
    counts = {"dgrad": 0, "wgrad": 0}
    kind = type(matmul.matmul_for(torch.float32))
    for name in counts:
        real = getattr(kind, name)

        def counted(*args: Any, _real: Any = real, _name: str = name, **more: Any) -> Any:
            counts[_name] += 1
            return _real(*args, **more)

        monkeypatch.setattr(kind, name, counted)

    def body(rank: int, schedule: str) -> dict[str, int]:
        counts.update(dgrad=0, wgrad=0)
        parallel = {"pipeline": 2, "pipeline_schedule": schedule, "pipeline_stages": 2}
        train_steps(rank, 2, case(steps=1, n_layers=4), parallel)
        return dict(counts)

    both = [run_ranks(2, body, name) for name in ("interleaved", "zero_bubble")]
    assert both[0] == both[1] and both[0][0]["wgrad"] > 0


@pytest.mark.dist
def test_evaluation_and_generation() -> None:
    whole = build(0, 1, TIED, {})
    whole.model.eval()
    with torch.no_grad():
        expected = whole.loss(make_batch(3), 1.0).nll
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8]]
    sampling = Sampling(seed=1)
    text = generate(whole.model, prompts, 6, 20, sampling)

    def body(rank: int, layout: dict[str, int]) -> tuple[torch.Tensor, list[Continuation], bool]:
        module = build(rank, 4, TIED, layout)
        module.model.eval()
        with torch.no_grad():
            nll = module.loss(rank_batch(module, 3), 1.0).nll
        texts = generate(module.model, prompts, 6, 20, sampling)
        return nll, texts, module.layout.counts_losses

    # Of what FSDP2 gathers, each rank with its own part of the batch.
    assert all(words == text for _, words, _ in run_ranks(4, body, {"tensor": 2}))
    for nll, words, counts in run_ranks(4, body, {"pipeline": 2, "tensor": 2}):
        assert words == text
        if counts:
            torch.testing.assert_close(nll, expected, atol=3e-6, rtol=0)


def heaviest(costs: list[float], before: float, after: float, cuts: tuple[int, ...]) -> float:
    """The cost of the dearest stage of layers that are cut there."""
    sums = [sum(costs[a:b]) for a, b in pairwise([0, *cuts, len(costs)])]
    sums[0] += before
    sums[-1] += after
    return max(sums)


def test_layers_are_split_by_cost() -> None:
    """Against all possible splits."""
    draw = random.Random(4)
    for _ in range(60):
        n = draw.randint(1, 8)
        costs = [draw.choice([1.0, 2.0, 5.5]) for _ in range(n)]
        before, after = draw.choice([0.0, 3.0]), draw.choice([0.0, 4.0])
        stages = draw.randint(1, n)
        parts = split_layers(costs, before, after, stages)
        assert [i for part in parts for i in part.blocks] == list(range(n))
        assert [p.first for p in parts] == [True] + [False] * (stages - 1)
        assert [p.last for p in parts] == [False] * (stages - 1) + [True]
        every = combinations(range(1, n), stages - 1)
        best = min(heaviest(costs, before, after, cuts) for cuts in every)
        ours = tuple(p.blocks.start for p in parts[1:])
        assert heaviest(costs, before, after, ours) == best
