"""State under DeepSpeed against ZeRO's table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny import make_corpus, tiny_config

from llmtrain.cli.main import main
from llmtrain.config.parallel import ParallelConfig
from llmtrain.config.schema import ModelConfig, RunConfig, TrainConfig
from llmtrain.model import complete, param_counts
from llmtrain.parallel import Degrees
from llmtrain.parallel.hardware import Precision
from llmtrain.planner import Setting, zero_state

MODEL = complete(ModelConfig(d_model=64, n_layers=3, n_heads=4, n_kv_heads=2), 300, 512)


def state(stage: int, compute: torch.dtype = torch.bfloat16, **more: Any) -> dict[str, int]:
    cfg = RunConfig(
        model=MODEL,
        parallel=ParallelConfig(engine="deepspeed", zero_stage=stage, **more),
        train=TrainConfig(global_batch_size=8),
    )
    precision = Precision(compute, torch.float32)
    return zero_state(Setting(cfg, MODEL, precision, Degrees(shard=4)))


def test_each_stage_shards_one_thing_more() -> None:
    n = param_counts(MODEL)["total"]
    for stage in (1, 2, 3):
        assert state(stage)["weights (fp32)"] == n
        assert state(stage)["optimizer state"] == 2 * n
    # A quarter of float32 gradients, and a bucket that takes all of this small model.
    assert [state(s)["gradients (fp32)"] for s in (1, 2, 3)] == [6 * n, 5 * n, 5 * n]
    assert state(1, torch.float32)["gradients (fp32)"] == 4 * n
    assert [state(s)["compute copies"] for s in (1, 2)] == [2 * n, 2 * n]
    assert n // 2 < state(3)["compute copies"] < 2 * n
    host = {kind for kind in state(2, offload_optimizer=True) if kind.endswith("(host)")}
    assert host == {"weights (fp32) (host)", "optimizer state (host)"}


def test_a_dry_run_shows_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = make_corpus(tmp_path, documents=40)
    config = tiny_config(tmp_path, corpus)
    words = ["parallel.engine=deepspeed", "parallel.offload_optimizer=true", "--world", "2"]
    assert main(["train", str(config), "--dry-run", *words]) == 0
    out = capsys.readouterr().out
    assert "optimizer state (host)" in out and "all, without what is offloaded" in out
    assert "all-gather" in out and "parameters, at most" in out
