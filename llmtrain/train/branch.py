"""Branches: another tail from a point of a run, at the cost of the tail alone.

A branch takes the trunk's weights, optimizer state, learning-rate curve, data position and hook
state at a checkpoint, and goes on under a config of its own (``config.tail``). It is a run like
any other, in its own folder, and its past is the trunk's. Blakeney et al. 2024 (2406.03476) use
branches to compare durations of domain upsampling and to value a source by leaving it out.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llmtrain.checkpoint import checkpoints_folder, read_files, scan
from llmtrain.checkpoint.layout import LOCK
from llmtrain.config import Duration, RunConfig, load_config
from llmtrain.config.diff import diff_configs
from llmtrain.config.tail import Tail, load_tail
from llmtrain.errors import CheckpointError, ConfigError, EnvironmentFault, LlmtrainError
from llmtrain.parallel import World
from llmtrain.report.tree import BRANCH, BRANCHES, read_branch, write_branch
from llmtrain.train.clockwork import Clockwork
from llmtrain.train.run import run_folder, train

# Keys that may differ when the same branch, or task of a sequence, is started again.
FREE = (
    "parallel.", "log.", "device", "checkpoint.", "eval.", "out", "train.micro_batch_size",
    "train.recompute", "train.compile", "train.stop_after", "train.gc_every", "data.prefetch",
)  # fmt: skip


@dataclass(frozen=True)
class Point:
    """A checkpoint of a trunk to branch from. cfg: the config it was saved under."""

    trunk: Path
    checkpoint: Path
    step: int
    total: int
    cfg: RunConfig

    @property
    def tokens(self) -> int:
        """Tokens the trunk had trained on."""
        return self.step * self.cfg.train.global_batch_size * self.cfg.data.seq_len


@dataclass(frozen=True)
class Branch:
    """A branch that can be trained. changes: lines ``key: trunk's -> branch's``."""

    point: Point
    cfg: RunConfig
    changes: list[str]

    @property
    def folder(self) -> Path:
        """The branch's own folder."""
        return run_folder(self.cfg)


def find_point(trunk: Path, at: Duration) -> Point:
    """The checkpoint of ``trunk`` after the update that ``at`` names, rounded up to whole steps.

    Raises CheckpointError where the trunk has none there, ConfigError where ``at`` is not inside
    the run.
    """
    if not trunk.is_dir():
        raise CheckpointError(f"{trunk} is not a folder; give the folder of a run")
    found = scan(checkpoints_folder(trunk))
    good = [c for c in found if c.problem is None]
    if not good:
        problem = f": {found[-1].problem}" if found else ""
        raise CheckpointError(
            f"{trunk} holds no checkpoint to branch from{problem}; give the folder of a run that "
            "has saved one"
        )
    cfg = load_config(good[-1].path / "config.yaml")
    times = Clockwork.from_config(cfg)
    step = at.steps(times.tokens_per_step, times.total)
    if not 0 < step < times.total:
        where = "its end or after it" if step else "its beginning"
        raise ConfigError(
            f"--at {at}: step {step} of {trunk} is {where} (it has {times.total} steps); branch "
            "at a point inside the run"
        )
    for checkpoint in good:
        if checkpoint.step == step:
            own = load_config(checkpoint.path / "config.yaml")
            return Point(trunk, checkpoint.path, step, times.total, own)
    have = ", ".join(f"{c.step} ({c.step / times.total:.4g}dur)" for c in good[-12:])
    raise CheckpointError(
        f"--at {at}: {trunk} has no checkpoint of step {step}; it has those of step {have}. Choose "
        f"one of them, or train the trunk with checkpoint.keep_at=[{at}]"
    )


def plan_branch(
    point: Point, tail: Path | None, overrides: Sequence[str] = (), ending: str = ""
) -> tuple[Branch, Tail]:
    """The branch that ``tail`` and ``overrides`` make at ``point``, and what the tail says.

    It is named by the tail, or TRUNK-TAILFILE; ``ending`` is put behind. Nothing is written.
    Raises ConfigError.
    """
    made = load_tail(point.cfg, point.step, tail, overrides)
    name = made.cfg.name
    if not made.named:
        name = f"{point.cfg.name}-{tail.stem if tail is not None else 'branch'}"
    cfg = dataclasses.replace(
        made.cfg,
        name=name + ending,
        checkpoint=dataclasses.replace(made.cfg.checkpoint, resume=str(point.checkpoint)),
    )
    stop = Clockwork.from_config(cfg).stop
    if point.step >= stop:
        raise ConfigError(
            f"the branch {cfg.name} ends at step {stop}, not after the branch point, step "
            f"{point.step}; give it a longer train.duration or branch earlier"
        )
    changes = [
        line
        for line in diff_configs(point.cfg, cfg)
        if line.partition(":")[0] not in ("name", "checkpoint.resume")
    ]
    branch = Branch(point, cfg, changes)
    _check_folder(branch)
    return branch, made


def start(branch: Branch, world: World) -> int:
    """Train a branch, or go on with it where it was broken off; returns the exit code.

    The tree of runs is recorded first, by the main process; a new branch that is refused before
    its first step leaves nothing behind. Raises LlmtrainError.
    """
    point, new = branch.point, not branch.folder.exists()
    if world.is_main:
        record = {
            "step": point.step,
            "tokens": point.tokens,
            "checkpoint": os.path.relpath(point.checkpoint, branch.folder),
            "changes": branch.changes,
        }
        try:
            write_branch(branch.folder, point.trunk, record)
        except OSError as error:
            raise EnvironmentFault(
                f"{error.filename}: the branch cannot be recorded ({error.strerror}); the "
                "trunk's folder and `out` must be writable"
            ) from error
    try:
        return train(branch.cfg, world)
    except LlmtrainError:
        if world.is_main and new:
            _forget(branch)
        raise


def _forget(branch: Branch) -> None:
    """Remove a branch that has not begun: its folder, and what the trunk records of it."""
    folder, branches = branch.folder, branch.point.trunk / BRANCHES
    checkpoints = checkpoints_folder(folder)
    if {*folder.rglob("*")} <= {folder / BRANCH, checkpoints, checkpoints / LOCK}:
        shutil.rmtree(folder, ignore_errors=True)
        (branches / f"{folder.name}.json").unlink(missing_ok=True)
        if not any(branches.iterdir()):
            branches.rmdir()


def taken_over(branch: Branch) -> int:
    """Global sample from which a mixture of the branch's own can take over.

    A block of samples that has begun is kept whole, so this is the branch point itself only
    where a block of the trunk ends there.
    """
    from llmtrain.data.mixture import Mixture
    from llmtrain.data.phases import from_json

    state = json.loads(read_files(branch.point.checkpoint)["data.json"])
    *earlier, current = [from_json(schedule) for schedule in state["schedules"]]
    names = list(state["sources"])
    mixture = Mixture(names, current, state["block_size"], state["seed"], earlier)
    return mixture.block_end(branch.point.step * branch.cfg.train.global_batch_size)


def _check_folder(branch: Branch) -> None:
    """The branch's folder is new, or holds this very branch."""
    folder, point = branch.folder, branch.point
    if folder.resolve() == point.trunk.resolve():
        raise ConfigError(
            f"name: {branch.cfg.name!r} is the trunk's own name; give the branch another, with "
            "name=..."
        )
    old = read_branch(folder)
    remedy = f"give this branch another name, with name=..., or delete {folder}"
    if old is None:
        if (folder / "metrics.jsonl").exists() or (folder / BRANCH).exists():
            raise ConfigError(f"{folder} exists and is no branch of this point; {remedy}")
        return
    if not (folder / "metrics.jsonl").exists():
        return  # it was refused before its first step: nothing is lost
    there = Path(os.path.normpath(folder / str(old.get("trunk"))))
    if there.resolve() != point.trunk.resolve() or old.get("step") != point.step:
        raise ConfigError(
            f"{folder} is a branch of {there} at step {old.get('step')}, not of {point.trunk} at "
            f"step {point.step}; {remedy}"
        )
    before, now = (_binding(lines) for lines in (old.get("changes") or [], branch.changes))
    if before != now:
        line = sorted(before ^ now)[0]
        raise ConfigError(f"{folder} is a branch with another tail ({line}); {remedy}")


def _binding(changes: Sequence[str]) -> set[str]:
    """The changes that make a branch another one."""
    return {line for line in changes if not line.startswith(FREE)}
