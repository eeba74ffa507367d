"""Sections of what looks after a run: evaluation, checkpoints, the guard, logs."""

from __future__ import annotations

from dataclasses import dataclass

from llmtrain.config.duration import Duration
from llmtrain.config.fields import dur, key


@dataclass(frozen=True)
class EvalConfig:
    """Held-out evaluation and samples."""

    every: Duration | None = key(lambda: dur("0.25dur"), "null: only at the end", gt=0)
    samples: int = key(64, "sequences per domain", ge=1)
    micro_batch_size: int | None = key(None, "null: the training one", ge=1)
    prompts: list[str] = key(list, "texts continued at the end of the run")
    generate_tokens: int = key(64, "length of each continuation", ge=1)


@dataclass(frozen=True)
class CheckpointConfig:
    """Saving and resuming."""

    every: Duration | None = key(lambda: dur("0.5dur"), "null: only at the end", gt=0)
    keep: int = key(2, "newest temporary checkpoints kept", ge=1)
    permanent_every: Duration | None = key(None, "checkpoints that are never pruned", gt=0)
    keep_at: list[Duration] = key(
        list, "more checkpoints that are never pruned, at these points: where branches leave", gt=0
    )
    snapshot_every: Duration | None = key(
        None, "copies in each node's memory, for processes that are started again there", gt=0
    )
    remote: str | None = key(
        None, "object store that gets a copy of each checkpoint: s3://bucket/runs (extra remote)"
    )
    remote_keep: int = key(2, "newest temporary copies kept there", ge=1)
    asynchronous: bool = key(True, "write in the background from a copy on the host")
    save: str = key(
        "auto",
        "trainable: leave frozen weights out and refer to the checkpoint of init.path for them; "
        "all; auto: trainable where only adapters train",
        choices=("auto", "trainable", "all"),
    )
    resume: str = key("auto", "auto: newest complete one of the run; never; or a path")


@dataclass(frozen=True)
class GuardConfig:
    """What happens on a non-finite or spiking loss or gradient norm."""

    nonfinite: str = key("stop", "loss or gradient norm not finite", choices=("stop", "skip"))
    spike: str = key(
        "count", "beyond `sigma` of the window", choices=("ignore", "count", "skip", "stop")
    )
    sigma: float = key(6.0, "standard deviations that make a spike", gt=0)
    window: int = key(128, "steps in the window", ge=8)
    replay: bool = key(
        True, "make a suspicious step again: transient, persistent, or genuine; engine native"
    )
    max_skips: int = key(10, "stop after so many skipped steps in a row", ge=1)


@dataclass(frozen=True)
class LogConfig:
    """What is printed and recorded."""

    every: int = key(10, "steps between log lines", ge=1)
    tensorboard: bool = key(True, "write TensorBoard events")
    wandb: str | None = key(None, "Weights & Biases project (extra wandb)")
    mlflow: str | None = key(None, "MLflow experiment (extra mlflow)")
