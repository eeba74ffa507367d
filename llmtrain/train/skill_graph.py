"""Learning a skill graph: how much training on each source alone helps every other.

After Chen et al. 2023 (Skill-it, 2307.14430), algorithm 2 in its cheaper form: from one checkpoint
one short branch per source. The edge A_ij is the fall of source j's held-out loss while only source
i is trained on, none where it rises, divided by the largest edge (that scale is ours: it makes
``online.eta`` mean the same for every graph).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from llmtrain.config import Duration
from llmtrain.config.schema import PhaseConfig
from llmtrain.data.loader import heldout_sets
from llmtrain.errors import ConfigError, EnvironmentFault
from llmtrain.eval.checkpoint import evaluate_checkpoint
from llmtrain.parallel import close_world, init_world
from llmtrain.train.branch import Branch, find_point, plan_branch, start
from llmtrain.train.clockwork import Clockwork
from llmtrain.train.console import table
from llmtrain.train.tails import losses

Graph = dict[str, dict[str, float]]


def plan_graph(
    trunk: Path, at: Duration, length: Duration, overrides: Sequence[str]
) -> list[tuple[str, Branch]]:
    """(source, the branch that trains on it alone for ``length``) for each source at ``at``.

    Raises ConfigError where the branches would leave the run or a source has no held-out text.
    """
    point = find_point(trunk, at)
    times = Clockwork.from_config(point.cfg)
    steps = max(length.steps(times.tokens_per_step, times.total), 1)
    if point.step + steps > times.total:
        raise ConfigError(
            f"--for {length}: the branches would end at step {point.step + steps}, after the "
            f"run's {times.total}; make --for shorter, or --at earlier"
        )
    phases = point.cfg.data.phases or [PhaseConfig(weights=point.cfg.data.weights)]
    sources = [name for name, weight in phases[-1].weights.items() if weight > 0]
    if len(sources) < 2:
        raise ConfigError("--skill-graph: the run's last phase has one source; it needs two")
    held = {one.name for one in heldout_sets(point.cfg)}
    missing = [name for name in sources if name not in held]
    if missing:
        raise ConfigError(
            f"--skill-graph: the source {missing[0]!r} has no held-out text to measure; name it "
            f"in data.heldout.{missing[0]}"
        )
    found = []
    for name in sources:
        changes = alone(name, f"{point.step + steps}step")
        branch, _ = plan_branch(point, None, [*overrides, *changes], f"-only-{name}")
        found.append((name, branch))
    return found


def alone(source: str, until: str) -> list[str]:
    """The overrides that make a branch train on one source, up to the step ``until``."""
    stop = [f"train.stop_after={until}", "checkpoint.keep_at=[]"]
    return [*stop, "online=null", f"data.weights={{{source}: 1}}"]


def learn_graph(
    branches: Sequence[tuple[str, Branch]], out: Path, say: Callable[[str], None]
) -> Graph:
    """Train the branches that are not done, write the graph to ``out`` and print it."""
    point, names = branches[0][1].point, [name for name, _ in branches]
    world = init_world(branches[0][1].cfg.device)
    try:
        for name, branch in branches:
            say(f"branch {branch.cfg.name}: {name} alone, from step {point.step}")
            start(branch, world)
        before = {}
        if world.is_main:
            device = branches[0][1].cfg.device
            samples = f"eval.samples={branches[0][1].cfg.eval.samples}"
            measured = evaluate_checkpoint(point.checkpoint, [samples], device)
            before = {name: metrics["loss"] for name, metrics in measured.domains.items()}
    finally:
        close_world()
    if not before:
        return {}
    after = {name: losses(branch.folder) for name, branch in branches}
    graph = edges(before, after)
    record = {"graph": graph, "run": str(point.trunk), "step": point.step, "before": before}
    try:
        out.write_text(json.dumps({**record, "after": after}, indent=1), encoding="utf-8")
    except OSError as error:
        raise EnvironmentFault(f"{out}: cannot be written ({error.strerror})") from error
    rows = [("trained on", *names)]
    rows += [(i, *(f"{graph[i][j]:.3f}" for j in names)) for i in names]
    for line in table(rows):
        say(line)
    first = {i: math.exp(math.fsum(graph[i].values())) for i in names}
    shares = ", ".join(f"{i}: {value / sum(first.values()):.3f}" for i, value in first.items())
    say(f"written: {out}; the paper's first weights at eta = 1: {{{shares}}}")
    return graph


def edges(before: dict[str, float], after: dict[str, dict[str, float]]) -> Graph:
    """A_ij = max(L_j before - L_j after training on i, 0) / the largest of them."""
    names = list(after)
    falls = {i: {j: max(before[j] - after[i][j], 0.0) for j in names} for i in names}
    top = max(fall for row in falls.values() for fall in row.values())
    if not top > 0:
        raise ConfigError(
            "--skill-graph: no held-out loss fell in any branch, so there is no edge; make --for "
            "longer or branch earlier"
        )
    return {i: {j: fall / top for j, fall in row.items()} for i, row in falls.items()}
