"""The model of a finished run, for tables of what it costs."""

from __future__ import annotations

from pathlib import Path

from llmtrain.config import RunConfig, load_config
from llmtrain.config.schema import ModelConfig
from llmtrain.data.plan import build_plan
from llmtrain.model import resolve_model


def shape_of(run: Path) -> tuple[RunConfig, ModelConfig]:
    """The config of a run and its resolved model."""
    cfg = load_config(run / "config.yaml")
    steps = cfg.train.duration.steps(cfg.train.global_batch_size * cfg.data.seq_len)
    plan = build_plan(cfg, steps * cfg.train.global_batch_size)
    return cfg, resolve_model(cfg, plan.vocab_size)
