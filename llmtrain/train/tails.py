"""Several tails from one trunk, and the table that compares them.

The drivers of Blakeney et al. 2024 (2406.03476): how long the upsampled phase should be (one tail
of several lengths d, section 4.2), and what a source is worth (the tail without it, section 4.3).
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from llmtrain.config import Duration
from llmtrain.errors import ConfigError
from llmtrain.parallel import close_world, init_world
from llmtrain.report.read import read_run
from llmtrain.report.summary import domain_results
from llmtrain.train.branch import (
    Branch,
    Point,
    check_data,
    find_point,
    plan_branch,
    start,
    taken_over,
)
from llmtrain.train.console import human, table

Losses = dict[str, float]


@dataclass(frozen=True)
class Study:
    """Branches to compare. labels: one for each. against: index of the branch that the others'
    losses are subtracted from (leave-one-out), None: losses as they are. command: the command
    line of each branch alone, for a job of its own."""

    title: str
    labels: list[str]
    branches: list[Branch]
    commands: list[str]
    against: int | None = None


def plan_tails(trunk: Path, at: Duration, tails: Sequence[Path], overrides: Sequence[str]) -> Study:
    """One branch at ``at`` for each tail; without a tail the trunk's own continuation."""
    point = find_point(trunk, at)
    wanted: Sequence[Path | None] = tails or [None]
    branches = [plan_branch(point, tail, overrides)[0] for tail in wanted]
    commands = [_command(point, at, tail, overrides, None) for tail in wanted]
    return _distinct(Study("tails", [b.cfg.name for b in branches], branches, commands))


def plan_sweep(
    trunk: Path, shares: Sequence[Fraction], tail: Path | None, overrides: Sequence[str]
) -> Study:
    """The tail over the last d of the run, for each share d of its length.

    d = 0 is the trunk itself, which the table shows anyway. Raises ConfigError for a share that is
    not in [0, 1) or that comes twice.
    """
    if len(set(shares)) != len(shares):
        raise ConfigError("--sweep: a share comes twice; write each once, such as 0.05,0.1,0.2")
    wrong = next((share for share in shares if not 0 <= share < 1), None)
    if wrong is not None or not any(shares):
        raise ConfigError(
            f"--sweep: {float(wrong or 0):g} is no part of the run; write shares between 0 and 1, "
            "such as 0.05,0.1,0.2 (0 beside them is the trunk itself)"
        )
    branches, labels, commands = [], [], []
    for share in filter(None, shares):
        at = Duration(1 - share, "dur")
        point = find_point(trunk, at)
        branch = plan_branch(point, tail, overrides, f"-d{float(share):g}")[0]
        branches.append(branch)
        labels.append(f"d = {float(share):g}")
        commands.append(_command(point, at, tail, overrides, branch.cfg.name))
    if 0 in shares:
        _check_ended(branches[0].point)
    return _distinct(Study("share of the run on the tail's mixture", labels, branches, commands))


def plan_leave_one_out(
    trunk: Path, at: Duration, tail: Path | None, overrides: Sequence[str]
) -> Study:
    """The tail, and the tail without each of its sources; the other shares grow in proportion.

    Raises ConfigError where the tail does not write ``data.weights`` with two sources or more.
    """
    point = find_point(trunk, at)
    whole, made = plan_branch(point, tail, overrides)
    sources = [name for name, weight in (made.weights or {}).items() if weight > 0]
    if len(sources) < 2:
        raise ConfigError(
            "--leave-one-out: the tail has no data.weights with two sources or more (data.phases "
            "do not do); write them in TAIL.yaml or as data.weights='{a: 0.5, b: 0.5}'"
        )
    branches, labels = [whole], ["all sources"]
    commands = [_command(point, at, tail, overrides, None)]
    for name in sources:
        without = [*overrides, f"data.weights.{name}=0"]
        branch = plan_branch(point, tail, without, f"-without-{name}")[0]
        branches.append(branch)
        labels.append(f"without {name}")
        commands.append(_command(point, at, tail, without, branch.cfg.name))
    return _distinct(Study("loss minus that of all sources", labels, branches, commands, 0))


def describe(study: Study) -> list[str]:
    """What would be trained, without training it: the lines of ``--dry-run``."""
    lines = []
    for branch, command in zip(study.branches, study.commands, strict=True):
        point, cfg = branch.point, branch.cfg
        left = (point.total - point.step) * cfg.train.global_batch_size * cfg.data.seq_len
        lines.append(f"{branch.folder}: from {point.checkpoint}, {human(left)} tokens to train")
        lines += [f"  {change}" for change in branch.changes]
        if any(change.startswith(("data.phases", "data.weights")) for change in branch.changes):
            late = taken_over(branch) - point.step * cfg.train.global_batch_size
            where = f"{late} samples later, where a block ends" if late else "at the branch point"
            lines.append(f"  the mixture changes {where}")
        lines.append(f"  {command}")
    return lines


def run_study(study: Study, say: Callable[[str], None]) -> None:
    """Train every branch that is not done, one after the other, then print the table."""
    world = init_world(study.branches[0].cfg.device)
    try:
        for branch in study.branches:
            # All of them, before the first takes its time.
            check_data(branch)
        for label, branch in zip(study.labels, study.branches, strict=True):
            say(f"branch {branch.cfg.name} ({label}), from step {branch.point.step}")
            start(branch, world)
    finally:
        close_world()
    for line in results(study):
        say(line)


def results(study: Study) -> list[str]:
    """The last held-out losses of the branches as lines of a table, the trunk's own first."""
    rows = [
        (label, losses(b.folder)) for label, b in zip(study.labels, study.branches, strict=True)
    ]
    if study.against is None:
        trunk = study.branches[0].point
        if ended(trunk):
            rows.insert(0, (f"trunk {trunk.cfg.name}", losses(trunk.trunk)))
    domains = list(dict.fromkeys(name for _, found in rows for name in found))
    if not domains:
        return ["no held-out losses: the runs have no held-out data"]
    base = rows[study.against][1] if study.against is not None else {}
    lines = [("held-out loss: " + study.title, *domains, "mean")]
    for i, (label, found) in enumerate(rows):
        values = [found.get(name, math.nan) for name in domains]
        form = "{:.4f}"
        if study.against is not None and i != study.against:
            values = [v - base.get(n, math.nan) for v, n in zip(values, domains, strict=True)]
            form = "{:+.4f}"
        values.append(math.fsum(values) / len(values))
        lines.append((label, *(form.format(value) for value in values)))
    return table(lines)


def losses(run: Path) -> Losses:
    """Domain -> last held-out loss of a run."""
    return {d.name: d.loss for d in domain_results(read_run(run))}


def ended(point: Point) -> bool:
    """Whether the trunk has been evaluated at its end, under the config of this point."""
    evals = read_run(point.trunk).evals
    return bool(evals) and evals[-1]["step"] == point.total


def _check_ended(point: Point) -> None:
    steps = read_run(point.trunk).steps
    if not steps or steps[-1]["step"] < point.total:
        raise ConfigError(
            f"--sweep: 0 is the trunk itself, and {point.trunk} has not reached its end, step "
            f"{point.total}; train it to its end, or leave the 0 away"
        )


def _distinct(study: Study) -> Study:
    names = [branch.cfg.name for branch in study.branches]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(
            f"two branches would be called {twice!r}; give the tail files other names, or none a "
            "`name` of its own"
        )
    return study


def _command(
    point: Point, at: Duration, tail: Path | None, overrides: Sequence[str], name: str | None
) -> str:
    words = ["llmtrain", "branch", str(point.trunk), "--at", str(at)]
    words += [str(tail)] if tail is not None else []
    words += [text for text in overrides if name is None or text.partition("=")[0] != "name"]
    words += [f"name={name}"] if name is not None else []
    return shlex.join(words)
