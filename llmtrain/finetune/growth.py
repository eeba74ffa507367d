"""Sequences with an infinite schedule that grow: the last task annealed, and now has a successor.

The task before new ones must end at the constant rate. What was trained up to its annealing is
kept: a second run of the task, ``N-name-constant``, leaves it at the checkpoint before the
annealing and trains the same steps, of the same data, at the constant rate. It ends where the task
would have ended in a sequence that had been this long from the beginning.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from llmtrain.checkpoint import Checkpoint, checkpoints_folder, scan
from llmtrain.config import Duration, RunConfig, load_config
from llmtrain.config.diff import diff_configs
from llmtrain.config.lr_curve import Schedule
from llmtrain.errors import ConfigError
from llmtrain.train.branch import FREE, Point
from llmtrain.train.clockwork import Clockwork
from llmtrain.train.run import run_folder

_DECAY = "schedule.decay:"


def keep_before_annealing(cfg: RunConfig) -> RunConfig:
    """``cfg`` with a permanent checkpoint where an infinite schedule's annealing begins."""
    step = annealing(cfg)
    if cfg.schedule.name != "infinite" or not 0 < step < Clockwork.from_config(cfg).total:
        return cfg
    at = [*cfg.checkpoint.keep_at, Duration.parse(f"{step}step")]
    return dataclasses.replace(cfg, checkpoint=dataclasses.replace(cfg.checkpoint, keep_at=at))


def annealing(cfg: RunConfig) -> int:
    """Update after which an infinite schedule anneals."""
    times = Clockwork.from_config(cfg)
    parts = Schedule.from_config(cfg.schedule, times.total, times.tokens_per_step)
    return max(parts.total - parts.decay, parts.warmup + parts.cooldown)


def at_constant_rate(cfg: RunConfig) -> tuple[RunConfig, Point | None]:
    """The run of a task that has a successor, and where it leaves the annealed one, if there is
    such a run on disk; else ``cfg`` and None.

    Raises ConfigError where the checkpoint before the annealing is gone.
    """
    trunk = run_folder(cfg)
    constant = dataclasses.replace(cfg, name=f"{cfg.name}-constant")
    own = run_folder(constant)
    if cfg.schedule.name != "infinite":
        return cfg, None
    if (trunk / "config.yaml").exists():
        old = load_config(trunk / "config.yaml")
        changed = [x for x in diff_configs(settled(old), settled(cfg)) if not x.startswith(FREE)]
        if not changed or not all(line.startswith(_DECAY) for line in changed):
            return cfg, None
        good = [c for c in scan(checkpoints_folder(trunk)) if c.problem is None]
        before = [c for c in good if c.step <= annealing(old)]
        if before:
            return _leaving(constant, before[-1])
    else:
        old, good = cfg, []
    if any(c.problem is None for c in scan(own / "checkpoints")):
        # It has left the other already, and goes on from its own checkpoints.
        return dataclasses.replace(constant, init=load_config(own / "config.yaml").init), None
    if good and annealing(old) > 0:
        raise ConfigError(
            f"{trunk} has annealed as the last task, and its checkpoint of step {annealing(old)}, "
            f"before that, is gone; delete {trunk}, and the task is trained again at the constant "
            "rate, or leave the tasks as they were"
        )
    return (cfg if old is cfg else constant), None


def _leaving(cfg: RunConfig, checkpoint: Checkpoint) -> tuple[RunConfig, Point]:
    """``cfg`` from a checkpoint of the annealed run on."""
    there = load_config(checkpoint.path / "config.yaml")
    total = Clockwork.from_config(there).total
    point = Point(checkpoint.path.parents[1], checkpoint.path, checkpoint.step, total, there)
    resume = dataclasses.replace(cfg.checkpoint, resume=str(checkpoint.path))
    return dataclasses.replace(cfg, init=None, checkpoint=resume), point


def settled(cfg: RunConfig) -> RunConfig:
    """``init.path`` without links: two names of one run's folder are the same beginning."""
    if cfg.init is None:
        return cfg
    path = str(Path(cfg.init.path).expanduser().resolve())
    return dataclasses.replace(cfg, init=dataclasses.replace(cfg.init, path=path))
