"""Running a sequence of tasks: each its own run in a folder below one folder, merges between.

Whatever is done stays done: a finished task is not trained again, a merge that is there is not
made again, and a task that was broken off goes on from its own checkpoint. ``sequence.json``
holds what was measured after each finished task.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

from llmtrain.checkpoint import HOOK_PREFIX, MODEL_PREFIX, checkpoints_folder, read_files, scan
from llmtrain.checkpoint.coordination import Ranks
from llmtrain.checkpoint.layout import read_layout
from llmtrain.checkpoint.store import explain
from llmtrain.checkpoint.tensors import DTYPES
from llmtrain.config import RunConfig, load_config, to_yaml
from llmtrain.config.diff import diff_configs
from llmtrain.errors import ConfigError
from llmtrain.finetune.fit import check_fit
from llmtrain.finetune.growth import settled
from llmtrain.finetune.outcome import Outcome, Row
from llmtrain.finetune.plan import Sequence, Stage, mixture
from llmtrain.finetune.show import page
from llmtrain.merge.offline import merge_models
from llmtrain.parallel import World, close_world, init_world
from llmtrain.report.read import read_run
from llmtrain.report.tree import read_branch
from llmtrain.train.begin import evaluate_weights
from llmtrain.train.branch import FREE, Branch, start
from llmtrain.train.run import train

Say = Callable[[str], None]
RESULT, REPORT, TABLE = "sequence.json", "report.html", "table.txt"


def run_sequence(sequence: Sequence, say: Say, world: World | None = None) -> Outcome:
    """Train what is not done yet, and write table, JSON and report after every task.

    say: called with lines for the user, on the main rank. world: joined by the caller, who leaves
    it. Raises LlmtrainError; Preempted after a signal, when the same command goes on.
    """
    joined = init_world(sequence.cfg.device) if world is None else world
    try:
        return _run(sequence, say if joined.is_main else lambda line: None, joined)
    finally:
        if world is None:
            close_world()


def _run(sequence: Sequence, say: Say, world: World) -> Outcome:
    ranks = Ranks(world.cpu_group)
    ranks.on_main(lambda: check_fit(sequence, world.size))
    known = ranks.on_main(lambda: _claim(sequence))
    rows: list[Row] = []
    for i, stage in enumerate(sequence.stages):
        title = f"task {i + 1} of {len(sequence.stages)}, {stage.task.name}"
        if stage.task.name in known:
            say(f"{title}: done")
            rows.append(known[stage.task.name])
            continue
        say(f"{title}: {stage.task.trained or stage.run}")
        rows.append(_make(sequence, i, say, ranks, world))
        outcome = _outcome(sequence, rows)
        ranks.on_main(lambda outcome=outcome: _write(sequence, outcome))  # type: ignore[misc]
    outcome = _outcome(sequence, rows)
    for line in outcome.lines():
        say(line)
    say(f"model: {sequence.stages[-1].result}")
    say(f"report: {sequence.folder / REPORT}")
    return outcome


def _outcome(sequence: Sequence, rows: list[Row]) -> Outcome:
    tasks = [stage.task.name for stage in sequence.stages]
    domains = [stage.domains for stage in sequence.stages]
    return Outcome(sequence.cfg.name, sequence.section.method, tasks, domains, list(rows))


def _make(sequence: Sequence, index: int, say: Say, ranks: Ranks, world: World) -> Row:
    """Train a task, merge and measure, as far as that is not done; collective."""
    stage = sequence.stages[index]
    if stage.task.trained is not None:
        return Row(stage.task.name, _measured(stage, world))
    if not ranks.on_main(lambda: finished(stage)):
        _train(stage, world)
    seconds = ranks.on_main(lambda: _merge(stage, say))
    losses = ranks.on_main(lambda: _recorded(stage))
    if not losses:
        losses = _measured(stage, world)
    return ranks.on_main(lambda: _row(sequence, index, losses, seconds))


def _train(stage: Stage, world: World) -> None:
    """The task's run, or what is left of it; collective."""
    if stage.point is None:
        train(stage.cfg, world)
        return
    changes = diff_configs(stage.point.cfg, stage.cfg)
    kept = [line for line in changes if line.partition(":")[0] not in ("name", "init")]
    start(Branch(stage.point, stage.cfg, kept), world)


def _measured(stage: Stage, world: World) -> dict[str, float]:
    """Held-out loss by domain of the model after a task, under the run's layout; collective."""
    metrics = evaluate_weights(stage.cfg, stage.result, world)
    return {name: m["loss"] for name, m in metrics.items()}


def _claim(sequence: Sequence) -> dict[str, Row]:
    """Make the folder this sequence's own; returns what is done. Raises ConfigError."""
    folder, cfg = sequence.folder, sequence.cfg
    config = folder / "config.yaml"
    if (folder / "metrics.jsonl").exists():
        raise ConfigError(f"name: {folder} is the folder of a run; give the sequence another name")
    if config.exists():
        changed = _changes(load_config(config), cfg)
        if changed:
            raise ConfigError(
                f"{folder} was begun with other settings ({changed[0]}); tasks may be added at "
                "the end, all else needs another `name`, or delete the folder"
            )
    known = _read_rows(sequence)
    with explain(f"{folder} cannot be written"):
        folder.mkdir(parents=True, exist_ok=True)
        _replace(config, to_yaml(cfg))
    return known


def _changes(old: RunConfig, new: RunConfig) -> list[str]:
    """What differs beside keys that may, and tasks added at the end."""
    if old.continual is not None and new.continual is not None:
        tasks = new.continual.tasks[: len(old.continual.tasks)]
        new = dataclasses.replace(new, continual=dataclasses.replace(new.continual, tasks=tasks))
    return [line for line in diff_configs(old, new) if not line.startswith(FREE)]


def _read_rows(sequence: Sequence) -> dict[str, Row]:
    """Rows of finished tasks, in order, as far as their models are still there."""
    try:
        stored = json.loads((sequence.folder / RESULT).read_text(encoding="utf-8"))["rows"]
        rows = {row["task"]: Row(**row) for row in stored}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    found: dict[str, Row] = {}
    for stage in sequence.stages:
        whole = finished(stage) and (stage.recipe is None or stage.result.is_dir())
        if stage.task.name not in rows or not whole:
            break
        plain = rows[stage.task.name].run in ("", stage.run.name)
        if stage.task.trained is None and not plain:
            break  # measured when it was the last task, and had annealed
        found[stage.task.name] = rows[stage.task.name]
    return found


def finished(stage: Stage) -> bool:
    """Whether the task's run has saved its end. ConfigError when it has other settings."""
    if stage.task.trained is not None:
        return True
    file = stage.run / "config.yaml"
    if not file.exists():
        return False
    old, new = settled(load_config(file)), settled(stage.cfg)
    changed = [line for line in diff_configs(old, new) if not line.startswith(FREE)]
    if changed:
        raise ConfigError(
            f"{stage.run} was made with other settings ({changed[0]}); give the sequence another "
            "`name`, or delete that folder and those of the tasks after it"
        )
    return _end(stage) is not None


def _end(stage: Stage) -> Path | None:
    """The complete checkpoint of the run's last update."""
    found = scan(checkpoints_folder(stage.run))
    return next((c.path for c in found if c.problem is None and c.step == stage.steps), None)


def _merge(stage: Stage, say: Say) -> float:
    """Make the merge after a task unless it is there; returns the seconds it took."""
    if stage.recipe is None or stage.result.is_dir():
        return 0.0
    began = time.perf_counter()
    merge_models(stage.recipe, stage.result)
    say(f"merged by {stage.recipe.method}: {stage.result}")
    return time.perf_counter() - began


def _recorded(stage: Stage) -> dict[str, float]:
    """Held-out loss by domain as the run has recorded it at its end; empty: to be measured."""
    evals = read_run(stage.run).evals
    if stage.recipe is not None or not evals or evals[-1]["step"] != stage.steps:
        return {}
    average = stage.cfg.average
    beside = (f" ({average.method})",) if average is not None else ()
    domains = evals[-1]["domains"]
    return {n: float(m["loss"]) for n, m in domains.items() if not n.endswith(beside)}


def _row(sequence: Sequence, index: int, losses: dict[str, float], merged: float) -> Row:
    """What a finished task came to."""
    stage, cfg = sequence.stages[index], sequence.stages[index].cfg
    end = _end(stage)
    assert end is not None
    hooks = json.loads(read_files(end)["extra.json"])["hooks"]
    fisher = float(hooks.get("penalty", {}).get("seconds", 0.0))
    stored = 0
    if stage.recipe is not None:
        stored = _bytes(end, MODEL_PREFIX) * len(stage.recipe.paths)
    own = stage.task.weights
    shares = mixture(sequence.section, index)
    replayed = sum(share for name, share in shares.items() if name not in own)
    tokens = stage.steps * cfg.train.global_batch_size * cfg.data.seq_len
    seconds = _seconds(stage.run)
    kept = _bytes(end, HOOK_PREFIX)
    replay = round(replayed * tokens)
    beside = fisher + merged
    return Row(stage.task.name, losses, seconds, beside, kept, stored, replay, stage.run.name)


def _seconds(run: Path) -> float:
    """Time of training, with what came before the point where the run left another."""
    steps = read_run(run).steps
    record = read_branch(run)
    if record is not None:
        trunk = Path(os.path.normpath(run / str(record["trunk"])))
        steps = [r for r in read_run(trunk).steps if r["step"] <= record["step"]] + steps
    return math.fsum(float(record["seconds"]) for record in steps)


def _bytes(checkpoint: Path, prefix: str) -> int:
    """Bytes of a checkpoint's tensors of such names, over all ranks."""
    return sum(
        math.prod(layout.shape) * DTYPES[layout.dtype].itemsize
        for name, layout in read_layout(checkpoint).items()
        if name.startswith(prefix)
    )


def _write(sequence: Sequence, outcome: Outcome) -> None:
    """Table, JSON and report of what is done."""
    folder = sequence.folder
    with explain(f"{folder} cannot be written"):
        _replace(folder / TABLE, "\n".join(outcome.lines()) + "\n")
        _replace(folder / REPORT, page(sequence, outcome))
        # Last: what stands here counts as done.
        _replace(folder / RESULT, json.dumps(outcome.as_dict(), indent=1) + "\n")


def _replace(path: Path, text: str) -> None:
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)
