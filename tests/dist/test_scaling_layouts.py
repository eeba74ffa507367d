"""Parametrised models on every kind of layout: the run of one process, and what a layout cannot."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import pytest
import torch
from helpers.layout_runs import Case, alone, assert_same, case, train_steps
from helpers.ranks import run_ranks

from llmtrain.config.scaling import ScalingConfig
from llmtrain.parallel.zero import import_deepspeed

pytestmark = pytest.mark.dist

FIXED = ScalingConfig(parametrization="mus", base_width=64, tau=0.3)
RUNNING = ScalingConfig(parametrization="mus", residual="running_mean", attention="sqrt")
MUP = ScalingConfig(parametrization="mup", base_width=16)
# Biases, a norm with a bias, dropout, one key head, Lion with fully decoupled decay.
MUS = dataclasses.replace(
    case(
        norm="layernorm", norm_bias=True, norm_placement="post_branch", activation="gelu",
        attention_bias=True, attention_out_bias=True, mlp_bias=True, n_kv_heads=1, dropout=0.1,
        scaling=FIXED,
    ),
    optim=(("name", "lion"), ("lr", 1e-3), ("decoupled", "fully"), ("weight_decay", 0.01)),
)  # fmt: skip
# Five branches' worth of running means over the stages of a pipeline, tied, AdamW.
MEAN = case(n_layers=4, norm_placement="post_branch", tie_embeddings=True, scaling=RUNNING)
MUP_TIED = case(n_layers=4, tie_embeddings=True, scaling=MUP)
SELECTIVE = (("micro_batch_size", 3), ("recompute", "selective"))
FULL = (("micro_batch_size", 2), ("recompute", "full"))

RUNS: dict[str, tuple[Case, int, dict[str, Any]]] = {
    "mus, FSDP2": (MUS, 2, {}),
    "mus, TP2": (MUS, 2, {"tensor": 2, "sequence": False}),
    "mus, TP2+SP": (MUS, 2, {"tensor": 2}),
    "mus, TP2+SP, recomputed": (dataclasses.replace(MUS, train=FULL), 2, {"tensor": 2}),
    "mus, TP2+SP, selective": (dataclasses.replace(MUS, train=SELECTIVE), 2, {"tensor": 2}),
    "mus, TP2+SP+FSDP2": (MUS, 4, {"tensor": 2}),
    "mus, PP2": (MUS, 2, {"pipeline": 2}),
    "running mean, FSDP2": (MEAN, 2, {}),
    "running mean, TP2+SP": (MEAN, 2, {"tensor": 2}),
    "running mean, PP2 interleaved": (
        MEAN,
        2,
        {"pipeline": 2, "pipeline_schedule": "interleaved"},
    ),
    "running mean, PP2 zero bubble": (
        MEAN,
        2,
        {"pipeline": 2, "pipeline_schedule": "zero_bubble"},
    ),
    "running mean, PP2+TP2": (MEAN, 4, {"pipeline": 2, "tensor": 2}),
    "mup, TP2+SP+FSDP2": (MUP_TIED, 4, {"tensor": 2}),
    "mup, PP2": (MUP_TIED, 2, {"pipeline": 2}),
    "mus, ZeRO-1": (MUS, 2, {"engine": "deepspeed", "zero_stage": 1}),
    "mus, ZeRO-3": (MUS, 2, {"engine": "deepspeed", "zero_stage": 3}),
    "mus, ZeRO-2 x TP2": (MUS, 4, {"engine": "deepspeed", "zero_stage": 2, "tensor": 2}),
}


@pytest.fixture(scope="module", autouse=True)
def _imported() -> None:
    """Ranks are forked: what is imported here they need not import."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import_deepspeed(torch.device("cpu"))


@pytest.mark.parametrize("run", RUNS)
def test_the_same_run(run: str) -> None:
    what, world, parallel = RUNS[run]
    expected = alone(dataclasses.replace(what, train=MUS.train))
    for ours in run_ranks(world, lambda rank: train_steps(rank, world, what, parallel)):
        assert_same(ours, expected)


def test_factors_change_the_run() -> None:
    """What the layouts agree on depends on the parametrisation."""
    model = dict(MUS.model)
    for change in ({"base_width": 32}, {"tau": 0.31}):
        other = dataclasses.replace(FIXED, **change)
        what = dataclasses.replace(MUS, model=tuple({**model, "scaling": other}.items()), steps=2)
        assert train_steps(0, 1, what, {}).losses[1] != alone(MUS).losses[1]


def test_compute_in_bf16_stays_near() -> None:
    what = dataclasses.replace(MUS, compute=torch.bfloat16)
    for ours, exact in zip(train_steps(0, 1, what, {}).losses, alone(MUS).losses, strict=True):
        assert ours == pytest.approx(exact, rel=5e-3)
