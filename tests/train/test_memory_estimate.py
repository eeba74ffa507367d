"""The dry run's estimate of memory: split sequences, and ZeRO."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from llmtrain.config.schema import ModelConfig, ParallelConfig, RunConfig, TrainConfig
from llmtrain.model import complete, param_counts
from llmtrain.parallel import Degrees
from llmtrain.parallel.hardware import Precision
from llmtrain.train.dryrun import memory_estimate

MODEL = complete(ModelConfig(d_model=64, n_layers=3, n_heads=4, n_kv_heads=2), 300, 512)


def estimate(context: int, method: str = "allgather", recompute: str = "none") -> dict[str, int]:
    cfg = RunConfig(
        model=MODEL,
        parallel=ParallelConfig(context=context, context_method=method),
        train=TrainConfig(global_batch_size=6, micro_batch_size=3, recompute=recompute),
    )
    cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, seq_len=512))
    precision = Precision(torch.bfloat16, torch.float32)
    return memory_estimate(cfg, MODEL, precision, Degrees(context=context))


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_split_sequences_divide_activations(recompute: str) -> None:
    whole, split = (estimate(n, recompute=recompute) for n in (1, 4))
    assert split["activations"] * 4 == whole["activations"]
    assert split["weights (fp32)"] == whole["weights (fp32)"] // 4


def test_keys_and_values_of_other_ranks() -> None:
    # A token's key and value, two heads of 16 each in bfloat16; three sequences at a time.
    token, others = 2 * 2 * 16 * 2, 3 * (512 - 128)
    assert estimate(1)["gathered keys/values"] == 0
    assert estimate(4)["gathered keys/values"] == 3 * others * token
    assert estimate(4, recompute="full")["gathered keys/values"] == others * token
    assert estimate(4, "ring")["gathered keys/values"] == 2 * 3 * 128 * token


def zero(stage: int, compute: torch.dtype = torch.bfloat16, **more: object) -> dict[str, int]:
    cfg = RunConfig(
        model=MODEL,
        parallel=ParallelConfig(engine="deepspeed", zero_stage=stage, **more),  # type: ignore[arg-type]
        train=TrainConfig(global_batch_size=8),
    )
    return memory_estimate(cfg, MODEL, Precision(compute, torch.float32), Degrees(shard=4))


def test_zero_stages_shard_one_thing_more_each() -> None:
    """ZeRO's table: optimizer, gradients, parameters divided by the number of ranks."""
    n = param_counts(MODEL)["total"]
    for stage in (1, 2, 3):
        assert zero(stage)["weights (fp32)"] == n
        assert zero(stage)["optimizer state"] == 2 * n
    assert [zero(s)["gradients (fp32)"] for s in (1, 2, 3)] == [6 * n, 5 * n, 5 * n]
    assert zero(1, torch.float32)["gradients (fp32)"] == 4 * n
    assert [zero(s)["compute copies"] for s in (1, 2)] == [2 * n, 2 * n]
    assert zero(3)["compute copies"] < 2 * n
    offloaded = zero(2, offload_optimizer=True)
    assert {k for k in offloaded if "host" in k} == {
        "weights (fp32) (host)",
        "optimizer state (host)",
    }
