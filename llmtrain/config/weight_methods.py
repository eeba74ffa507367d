"""Sections of methods that change the weights besides the optimizer."""

from __future__ import annotations

from dataclasses import dataclass

from llmtrain.config.duration import Duration
from llmtrain.config.fields import dur, key


@dataclass(frozen=True)
class AverageConfig:
    """Averaging of weights during training: SFA, EMA, latest weights, Model Stock."""

    method: str = key(
        "sfa",
        "sfa: merge with the anchor again and again; ema: running average; latest: mean of the "
        "last snapshots; stock: merge separate excursions by their angles",
        choices=("sfa", "ema", "latest", "stock"),
    )
    every: Duration | None = key(
        lambda: dur("0.25dur"),
        "time between merges (sfa), updates (ema), snapshots (latest, stock); "
        "null: sfa merges at the end only",
        gt=0,
    )
    start: Duration = key(lambda: dur("0step"), "when averaging begins")
    beta: float = key(0.5, "sfa: weight of the anchor in a merge", ge=0, le=1)
    anchor: str = key(
        "start",
        "sfa, stock: start: the weights when averaging began; rolling: the last merged weights; "
        "or the path of a checkpoint",
    )
    decay: float = key(0.999, "ema: share of the average that stays at an update", ge=0, lt=1)
    keep: int = key(
        4, "latest: snapshots in the mean; stock: excursions in a merge, at least 2", ge=1
    )
    evaluate: bool = key(True, "ema, latest: every evaluation also measures the averaged weights")
    replace: bool = key(True, "ema, latest: the run ends with the averaged weights")
    storage: str = key(
        "cpu",
        "where copies lie: cpu: host memory; device: beside the weights; disk: files in the run's "
        "folder, mapped into memory",
        choices=("cpu", "device", "disk"),
    )
