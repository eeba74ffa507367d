"""The runs and merges that a section ``continual`` stands for; nothing is written or trained.

The folder is looked at where a sequence may have grown since (see ``growth``).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from llmtrain.config import RunConfig, from_dict, to_dict
from llmtrain.config.continual import EXPERTS, INTERPOLATING, ContinualConfig, TaskConfig
from llmtrain.errors import ConfigError
from llmtrain.finetune.growth import at_constant_rate, keep_before_annealing
from llmtrain.merge.recipe import MergeRecipe, ModelEntry
from llmtrain.train.branch import Point
from llmtrain.train.clockwork import Clockwork
from llmtrain.train.run import run_folder


@dataclass(frozen=True)
class Stage:
    """One task. cfg: its run (never trained where the task is trained already). recipe: the merge
    after it, if any; result: folder of the model that counts after the task. domains: whose mean
    loss is the task's. begins: folder or checkpoint of the weights it begins with (of a task that
    is trained already: ends with); None for random ones. point: where the run leaves an earlier
    one of the task that has annealed (see ``growth``)."""

    task: TaskConfig
    cfg: RunConfig
    recipe: MergeRecipe | None
    result: Path
    domains: tuple[str, ...]
    begins: str | None
    point: Point | None = None

    @property
    def run(self) -> Path:
        """The run's folder."""
        return run_folder(self.cfg)

    @property
    def steps(self) -> int:
        """Length of the run."""
        return Clockwork.from_config(self.cfg).total


@dataclass(frozen=True)
class Sequence:
    """Everything ``llmtrain continual`` does. folder: OUT/NAME, with the tasks' runs below."""

    cfg: RunConfig
    section: ContinualConfig
    folder: Path
    stages: list[Stage]


def plan_sequence(cfg: RunConfig) -> Sequence:
    """The tasks' runs and merges.

    Task k begins with the model after task k - 1; with a method that merges separately trained
    models (task-arithmetic, ties, model-stock) it begins with the base model, which is the one of
    ``init``, or without ``init`` the first task's. A first task that is trained already has no run:
    its model is only measured. Raises ConfigError naming the task.
    """
    section = cfg.continual
    if section is None:
        raise ConfigError(
            "continual: is missing; list the tasks in a section `continual` of the config, or "
            "train a single run with `llmtrain train`"
        )
    if cfg.checkpoint.resume != "auto":
        raise ConfigError(
            f"checkpoint.resume: {cfg.checkpoint.resume} does not go with a sequence, which goes "
            "on where it is; leave it auto, and delete the folder or change `name` to start anew"
        )
    stages: list[Stage] = []
    for i, task in enumerate(section.tasks):
        try:
            stages.append(_stage(cfg, section, task, stages))
        except ConfigError as error:
            raise ConfigError(f"continual.tasks.{i} ({task.name}): {error}") from error
    return Sequence(cfg, section, run_folder(cfg), stages)


def _stage(
    cfg: RunConfig, section: ContinualConfig, task: TaskConfig, before: list[Stage]
) -> Stage:
    number, folder = len(before) + 1, run_folder(cfg)
    plain = _expanded(task.overrides)
    mixed = [key for key in ("weights", "phases") if key in plain.get("data", {})]
    if mixed:
        raise ConfigError(
            f"overrides.data.{mixed[0]}: the mixture is the task's `weights`, with the earlier "
            "tasks' by continual.replay; write it there"
        )
    data = _over(to_dict(cfg), _method(section, before, cfg.init is not None))
    if data["schedule"]["name"] == "infinite":
        data["schedule"].update(_constant_phase(section, number))
    data = _over(data, plain)
    data["data"].update(weights=mixture(section, number - 1), phases=[])
    data.update(name=f"{number}-{task.name}", out=str(folder), continual=None)
    if task.duration is not None:
        data["train"]["duration"] = str(task.duration)
    start = _start(section, before, cfg.init.path if cfg.init is not None else None)
    if task.trained is not None:
        data["init"] = {"path": task.trained}
    elif start is not None and before:
        data["init"] = {"path": start, "optimizer": section.optimizer == "keep"}
    made = from_dict(data, for_training=True)
    begins = made.init.path if made.init is not None else None
    point = None
    if task.trained is None and number < len(section.tasks):
        made, point = at_constant_rate(made)
    elif task.trained is None:
        made = keep_before_annealing(made)
    run = run_folder(made)
    recipe = _recipe(section, before, start, run)
    result = run if recipe is None else folder / f"{made.name}-merged"
    if task.trained is not None:
        result = Path(task.trained).expanduser()
    domains = tuple(task.domains or [name for name, share in task.weights.items() if share > 0])
    return Stage(task, made, recipe, result, domains, begins, point)


def mixture(section: ContinualConfig, index: int) -> dict[str, float]:
    """Shares of task ``index``: its own, and ``replay`` spread evenly over the earlier tasks'."""

    def shares(task: TaskConfig) -> dict[str, float]:
        whole = sum(task.weights.values())
        return {name: share / whole for name, share in task.weights.items()}

    earlier = section.tasks[:index]
    replay = section.replay if earlier else 0.0
    out = {name: share * (1.0 - replay) for name, share in shares(section.tasks[index]).items()}
    for task in earlier if replay else ():
        for name, share in shares(task).items():
            out[name] = out.get(name, 0.0) + share * replay / len(earlier)
    return out


def _start(section: ContinualConfig, before: list[Stage], given: str | None) -> str | None:
    """Folder or checkpoint whose weights the next task begins with; None for random ones."""
    if not before:
        return given
    if section.method in EXPERTS:
        return given if given is not None else str(before[0].result)
    return str(before[-1].result)


def _method(section: ContinualConfig, before: list[Stage], pretrained: bool) -> dict[str, Any]:
    """The sections of a run that a method acts through; none where there is nothing to keep."""
    method = section.method
    if not before and not pretrained:
        return {}
    if method == "sfa":
        every = f"{Fraction(str(section.p))}dur"
        return {"average": {"method": "sfa", "every": every, "beta": section.beta}}
    if method == "ema":
        return {"average": {"method": "ema", "every": "1step", "decay": section.decay}}
    if method == "latest":
        every = f"{Fraction(str(section.p))}dur"
        return {"average": {"method": "latest", "every": every, "keep": section.keep}}
    if method == "l2":
        return {"penalty": {"kind": "l2", "strength": section.strength}}
    if method == "ewc" and before:
        last = before[-1]
        penalty = {"kind": "ewc", "strength": section.strength, "samples": section.samples}
        penalty["data"] = dict(last.task.weights)
        if last.cfg.penalty is not None:
            penalty["fisher"] = str(last.run)
        return {"penalty": penalty}
    return {}


def _constant_phase(section: ContinualConfig, number: int) -> dict[str, str]:
    """A run's part of an infinite schedule: warmup and cooldown first, annealing at the end."""
    parts: dict[str, str] = {}
    if number > 1:
        parts.update(warmup="0step", cooldown="0step")
    if number < len(section.tasks):
        parts["decay"] = "0step"
    return parts


def _recipe(
    section: ContinualConfig, before: list[Stage], start: str | None, run: Path
) -> MergeRecipe | None:
    """The merge after a task, None where its own run's weights stay."""
    method = section.method
    if start is None or method not in (*INTERPOLATING, *EXPERTS):
        return None
    if method in INTERPOLATING:
        return MergeRecipe(method, start, [ModelEntry(str(run))], beta=section.beta)
    own = [stage for stage in before if stage.task.trained is None]
    experts = [stage.run for stage in own if stage.begins is not None]
    models = [ModelEntry(str(path)) for path in (*experts, run)]
    if method == "model-stock":
        return MergeRecipe(method, start, models) if len(models) > 1 else None
    recipe = MergeRecipe(method, start, models, scale=section.scale)
    return dataclasses.replace(recipe, density=section.density) if method == "ties" else recipe


def _expanded(tree: dict[str, Any]) -> dict[str, Any]:
    """Dotted keys as nested ones."""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        inner = _expanded(value) if isinstance(value, dict) else value
        for part in reversed(key.split(".")):
            inner = {part: inner}
        out = _over(out, inner)
    return out


def _over(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """``top`` laid over ``base``, mapping by mapping."""
    out = dict(base)
    for key, value in top.items():
        old = out.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            out[key] = _over(old, value)
        else:
            out[key] = value
    return out
