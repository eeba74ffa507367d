"""Rules of ``init``, ``penalty``, ``continual`` and of schedules that begin again."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise
from pathlib import PurePath

from llmtrain.config.continual import EXPERTS, INTERPOLATING, ContinualConfig
from llmtrain.config.faults import Collector
from llmtrain.config.length import part_of_run
from llmtrain.config.schema import RunConfig

_RUN = ("train.duration", "train.global_batch_size", "data.seq_len")


def check_continual(cfg: RunConfig, faults: Collector, for_training: bool) -> None:
    """Add the faults of continual learning. for_training: a single run is wanted."""
    if cfg.init is not None:
        _check_init(cfg, faults)
    if cfg.penalty is not None:
        _check_penalty(cfg, faults)
    if cfg.continual is None:
        return
    if for_training:
        faults.add(
            "continual",
            "describes several runs; train them with `llmtrain continual`, or set continual=null",
        )
    _check_tasks(cfg.continual, faults)
    for key in ("average", "penalty"):
        if getattr(cfg, key) is not None:
            faults.add(
                key,
                f"stands beside continual.method, which sets it for each task; remove {key}, or "
                "write it under overrides of a task with method: sequential",
                "continual.method",
            )
    for key in ("weights", "phases"):
        if getattr(cfg.data, key):
            faults.add(
                f"data.{key}",
                f"stands beside continual.tasks, whose `weights` make each task's mixture; set "
                f"data.{key}=null, and for earlier data use continual.replay",
                "continual.tasks",
            )
    if cfg.init is not None and any(task.trained for task in cfg.continual.tasks[:1]):
        faults.add(
            "init",
            "stands beside a first task that is trained already; keep one",
            "continual.tasks.0.trained",
        )
    merges = cfg.continual.method in (*INTERPOLATING, *EXPERTS)
    if merges and cfg.continual.optimizer == "keep":
        faults.add(
            "continual.optimizer",
            f"keep: merged models of method {cfg.continual.method} have no moments; write fresh",
            "continual.method",
        )


def _check_init(cfg: RunConfig, faults: Collector) -> None:
    assert cfg.init is not None
    if not cfg.init.path.strip():
        faults.add("init.path", "is empty; name a checkpoint or a run's folder, or set init: null")
    if cfg.checkpoint.resume not in ("auto", "never"):
        faults.add(
            "init",
            "stands beside checkpoint.resume with a path; init begins a new run from weights, "
            "resume goes on with a run: keep one",
            "checkpoint.resume",
        )


def _check_penalty(cfg: RunConfig, faults: Collector) -> None:
    assert cfg.penalty is not None
    penalty = cfg.penalty
    if not penalty.anchor.strip():
        faults.add("penalty.anchor", "is empty; write start or the path of a checkpoint")
    if penalty.kind == "ewc":
        if not penalty.data and penalty.fisher is None:
            faults.add(
                "penalty.data",
                "is missing: ewc estimates Fisher information on sequences of earlier data; name "
                "their sources as {code: 1}, or a checkpoint with penalty.fisher",
                "penalty.kind",
                "penalty.fisher",
            )
        elif penalty.data and not sum(penalty.data.values()) > 0:
            faults.add("penalty.data", "has no share above 0; raise one", "penalty.kind")
        return
    for key in ("data", "fisher"):
        if getattr(penalty, key):
            faults.add(f"penalty.{key}", "is read by kind: ewc only; remove it", "penalty.kind")


def _check_tasks(section: ContinualConfig, faults: Collector) -> None:
    if not section.tasks:
        faults.add("continual.tasks", "is empty; list tasks, each with name and weights")
    names: list[str] = []
    for i, task in enumerate(section.tasks):
        where = f"continual.tasks.{i}"
        path = PurePath(task.name)
        if not task.name.strip() or len(path.parts) != 1 or task.name in ("..", "."):
            faults.add(f"{where}.name", f"{task.name!r} cannot name a folder; use a plain word")
        if task.name in names:
            faults.add(f"{where}.name", f"{task.name!r} comes twice; give each task its own name")
        names.append(task.name)
        if not task.weights:
            faults.add(f"{where}.weights", "is missing; write the task's sources as {code: 1}")
        elif not sum(task.weights.values()) > 0:
            faults.add(f"{where}.weights", "has no share above 0; raise one")
        if task.trained is not None and i > 0:
            faults.add(f"{where}.trained", "is for the first task only; remove it")
        for key in ("continual", "init", "name", "out"):
            if key in task.overrides:
                faults.add(
                    (*where.split("."), "overrides", key), "is set by the sequence; remove it"
                )


def check_restarts(cfg: RunConfig, faults: Collector) -> None:
    """``schedule.restarts`` and the parts of an infinite schedule fit into the run."""
    schedule = cfg.schedule
    warmup = part_of_run(cfg, schedule.warmup)
    depends = ("schedule.name", "schedule.warmup", *_RUN)
    if schedule.name == "infinite":
        parts = (schedule.cooldown, schedule.decay)
        if warmup + sum(part_of_run(cfg, part) for part in parts) > 1:
            faults.add(
                "schedule.cooldown",
                f"warmup {schedule.warmup}, cooldown {schedule.cooldown} and decay "
                f"{schedule.decay} together are longer than the run ({cfg.train.duration}); "
                "shorten one",
                "schedule.decay",
                *depends,
            )
        if schedule.min_factor > schedule.constant_factor:
            faults.add(
                "schedule.constant_factor",
                f"{schedule.constant_factor:g} is below min_factor {schedule.min_factor:g}, where "
                "the annealing ends; raise it",
                "schedule.min_factor",
                "schedule.name",
            )
    ends = [Fraction(0), *(part_of_run(cfg, at) for at in schedule.restarts), Fraction(1)]
    if schedule.restarts and any(b - a <= warmup for a, b in pairwise(ends)):
        faults.add(
            "schedule.restarts",
            "must rise, lie inside the run, and leave more than the warmup between each other",
            *depends,
        )
