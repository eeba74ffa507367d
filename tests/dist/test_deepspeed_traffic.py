"""What a step sends under DeepSpeed, counted, against what ``--dry-run`` says."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from helpers.ranks import run_ranks
from helpers.steps import count_step, setting_of, small_run

from llmtrain.planner import Setting, zero_traffic

pytestmark = pytest.mark.dist

# The norm of the gradients and its like.
NUMBERS = 64


def setting_for(
    stage: int, world: int, compute: torch.dtype = torch.float32, **more: Any
) -> Setting:
    run = small_run(
        parallel__engine="deepspeed",
        parallel__zero_stage=stage,
        train__micro_batch_size=2,
        train__global_batch_size=8,
        **more,
    )
    return setting_of(run, world, compute)


def counted(setting: Setting) -> Counter[str]:
    """Payload of a real step by collective."""
    total: Counter[str] = Counter()
    sent = run_ranks(setting.degrees.world, count_step, setting)[0]
    for (collective, _, _), (_, payload) in sent.items():
        if payload > NUMBERS:
            total[collective] += payload
    return total


def predicted(setting: Setting) -> Counter[str]:
    total: Counter[str] = Counter()
    for traffic in zero_traffic(setting):
        total[traffic.collective] += traffic.payload
    return total


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_zero_1_and_2_send_what_the_plan_says(stage: int, compute: torch.dtype) -> None:
    setting = setting_for(stage, 2, compute)
    real, plan = counted(setting), predicted(setting)
    assert plan["all-gather"] == real["all-gather"]
    assert abs(plan["all-reduce"] - real["all-reduce"]) <= NUMBERS


@pytest.mark.parametrize("stage", [1, 3])
def test_tensor_parallelism_adds_its_own(stage: int) -> None:
    setting = setting_for(stage, 4, parallel__tensor=2)
    real, plan = counted(setting), predicted(setting)
    assert plan["reduce-scatter"] == real["reduce-scatter"]
    assert abs(plan["all-reduce"] - real["all-reduce"]) <= NUMBERS
    if stage == 1:
        assert plan["all-gather"] == real["all-gather"]


def test_zero_3_gathers_at_most_what_the_plan_says() -> None:
    setting = setting_for(3, 2)
    real, plan = counted(setting), predicted(setting)
    assert plan["reduce-scatter"] == real["reduce-scatter"]
    assert plan["all-gather"] / 2 <= real["all-gather"] <= plan["all-gather"]
