"""Section of what watches over the processes of a run."""

from __future__ import annotations

from dataclasses import dataclass

from llmtrain.config.fields import key


@dataclass(frozen=True)
class WatchdogConfig:
    """When a rank that stands still is taken to hang; in seconds."""

    seconds: float | None = key(
        1200.0, "longest stand-still within a step before the run ends; null: no watchdog", gt=0
    )
    start: float = key(3600.0, "the same until the first step is made: loading, compiling", gt=0)
    evaluation: float = key(7200.0, "the same in evaluations and hooks", gt=0)
    checkpoint: float = key(7200.0, "the same while a checkpoint is taken or waited for", gt=0)
    slow: float = key(1.25, "name a rank slow whose own work takes so many times the median", gt=1)
