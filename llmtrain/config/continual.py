"""Sections of continual learning: what a run begins with, penalties, sequences of tasks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llmtrain.config.duration import Duration
from llmtrain.config.fields import key

# Methods of a sequence that merge finished models, by how a task's model is trained.
INTERPOLATING = ("wise-ft",)
EXPERTS = ("task-arithmetic", "ties", "model-stock")
METHODS = ("sequential", "sfa", "ema", "latest", "l2", "ewc", *INTERPOLATING, *EXPERTS)


@dataclass(frozen=True)
class InitConfig:
    """Begin a new run with the weights of another one, at step 0 and on data of its own."""

    path: str = key("", "a checkpoint, a run's folder for its newest one, or a merged model")
    optimizer: bool = key(False, "take over the optimizer's moments, too")


@dataclass(frozen=True)
class PenaltyConfig:
    """A penalty on moving away from an anchor, added to the gradients before clipping."""

    kind: str = key(
        "l2",
        "l2: strength/2 times the squared distance; ewc: each weight's distance counts by its "
        "Fisher information",
        choices=("l2", "ewc"),
    )
    strength: float = key(0.01, "lambda, the weight of the penalty", ge=0)
    anchor: str = key("start", "start: the weights the run begins with; or a checkpoint's path")
    data: dict[str, float] = key(
        dict, "ewc: source: share of the sequences the Fisher information is estimated on", ge=0
    )
    samples: int = key(64, "ewc: number of these sequences, a backward pass for each", ge=1)
    fisher: str | None = key(
        None, "ewc: checkpoint of a run with ewc, whose Fisher information is added (all so far)"
    )
    offload: bool = key(False, "anchor and Fisher information lie in host memory, read every step")


@dataclass(frozen=True)
class TaskConfig:
    """One task of a sequence: a run of its own, after the tasks before it."""

    name: str = key("", "name of the task; its run's folder is N-name")
    weights: dict[str, float] = key(dict, "source: share of the task's own tokens", ge=0)
    duration: Duration | None = key(
        None, "length of the task; null: train.duration", gt=0, units=("step", "tok")
    )
    trained: str | None = key(
        None, "first task: a checkpoint or run that has learnt it already; nothing is trained"
    )
    domains: list[str] = key(
        list, "held-out domains whose mean loss is the task's; empty: those of its sources"
    )
    overrides: dict[str, Any] = key(
        dict, "changes to the run's config for this task, such as {optim: {lr: 1e-4}}"
    )


@dataclass(frozen=True)
class ContinualConfig:
    """A sequence of tasks and what is done against forgetting, for ``llmtrain continual``."""

    method: str = key("sequential", "what is done against forgetting", choices=METHODS)
    tasks: list[TaskConfig] = key(list, "the tasks in order")
    replay: float = key(
        0.0, "share of a task's tokens that come from the earlier tasks' sources", ge=0, lt=1
    )
    p: float = key(
        0.25, "sfa, latest: time between merges or snapshots, as a share of the task", gt=0, le=1
    )
    beta: float = key(0.5, "sfa, wise-ft: weight of the earlier model in a merge", ge=0, le=1)
    decay: float = key(0.9, "ema: share of the average that stays at an update", ge=0, lt=1)
    keep: int = key(4, "latest: snapshots in the mean", ge=1)
    strength: float = key(0.01, "l2, ewc: weight of the penalty", ge=0)
    samples: int = key(64, "ewc: sequences of each task for its Fisher information", ge=1)
    scale: float = key(0.5, "task-arithmetic, ties: factor lambda on the merged change")
    density: float = key(0.2, "ties: share of each task's changes that stays", ge=0, le=1)
    optimizer: str = key(
        "fresh",
        "moments at the start of a task: fresh, or those of the one before",
        choices=("fresh", "keep"),
    )
