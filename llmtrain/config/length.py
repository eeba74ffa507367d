"""Durations against the length of the run."""

from __future__ import annotations

from fractions import Fraction

from llmtrain.config.duration import Duration
from llmtrain.config.schema import RunConfig


def part_of_run(cfg: RunConfig, duration: Duration) -> Fraction:
    """``duration`` as an exact fraction of the run; above 1 when it is longer."""
    if duration.unit == "dur":
        return duration.value
    tokens = cfg.train.global_batch_size * cfg.data.seq_len
    whole = cfg.train.duration
    if whole.unit == duration.unit:
        return duration.value / whole.value
    scale = {"step": tokens, "tok": 1, "dur": 1}
    return duration.value * scale[duration.unit] / (whole.value * scale[whole.unit])
