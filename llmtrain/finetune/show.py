"""A sequence of tasks for the eye: its plan as lines, its outcome as a page."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any

from llmtrain.finetune.outcome import Outcome
from llmtrain.finetune.plan import Sequence, Stage, mixture
from llmtrain.report.matrix import render_matrix
from llmtrain.report.numbers import bytes_text, duration

# Keys of the sections ``average``, ``penalty`` and ``continual`` that a method reads.
_AVERAGE = {
    "sfa": ("every", "beta", "anchor"),
    "ema": ("every", "decay"),
    "latest": ("every", "keep"),
    "stock": ("every", "keep", "anchor"),
}
_PENALTY = {"l2": ("strength", "anchor"), "ewc": ("strength", "anchor", "data", "samples")}
_MERGE = {"wise-ft": ("beta",), "task-arithmetic": ("scale",), "ties": ("scale", "density")}


def describe(sequence: Sequence, finished: Callable[[Stage], bool]) -> list[str]:
    """The plan as lines for the user: runs, where each begins, and merges."""
    lines = [f"{sequence.cfg.name}: {sequence.section.method}, {len(sequence.stages)} tasks"]
    for stage in sequence.stages:
        cfg = stage.cfg
        if stage.task.trained is not None:
            learnt = f"{_shares(cfg.data.weights)}; measured by {', '.join(stage.domains)}"
            lines += [f"{stage.result}: trained already", f"  data: {learnt}"]
            continue
        tokens = stage.steps * cfg.train.global_batch_size * cfg.data.seq_len
        done = " (done)" if finished(stage) else ""
        lines.append(f"{stage.run}: {stage.steps} steps, {tokens:,} tokens{done}")
        lines.append(f"  data: {_shares(cfg.data.weights)}; measured by {', '.join(stage.domains)}")
        begins = f"the weights of {cfg.init.path}" if cfg.init is not None else "random weights"
        if stage.point is not None:
            begins = f"{stage.point.checkpoint}, before its annealing, and stays at that rate"
        elif cfg.init is not None and cfg.init.optimizer:
            begins += " and the optimizer's moments"
        lines.append(f"  begins with {begins}")
        if cfg.average is not None:
            method = cfg.average.method
            lines.append(f"  average: {method}, {_settings(cfg.average, _AVERAGE[method])}")
        if cfg.penalty is not None:
            kind = cfg.penalty.kind
            lines.append(f"  penalty: {kind}, {_settings(cfg.penalty, _PENALTY[kind])}")
        if stage.recipe is not None:
            names = ", ".join(stage.recipe.paths)
            method = stage.recipe.method
            how = [f"{key} {getattr(sequence.section, key)}" for key in _MERGE.get(method, ())]
            lines.append(f"  then {', '.join([method, *how])} of {names}: {stage.result}")
    return lines


def page(sequence: Sequence, outcome: Outcome) -> str:
    """The HTML report."""
    found = outcome.numbers()
    facts = [(key.replace("_", " "), f"{value:.4f}") for key, value in found.items()]
    done = f"{len(outcome.rows)} of {len(outcome.tasks)}"
    facts += [("method", outcome.method), ("tasks done", done)]
    table = [["task", "run", "mixture", "training", "besides", "kept in memory"]]
    for i, row in enumerate(outcome.rows):
        times = (duration(row.seconds), duration(row.beside_seconds))
        stage = sequence.stages[i]
        run = stage.task.trained or os.path.relpath(stage.run, sequence.folder)
        shares = _shares(mixture(sequence.section, i))
        table.append([row.task, run, shares, *times, bytes_text(float(row.kept_bytes))])
    return render_matrix(outcome.name, outcome.tasks, outcome.matrix, facts, table)


def _shares(weights: dict[str, float]) -> str:
    return ", ".join(f"{name} {share:.3g}" for name, share in weights.items())


def _settings(section: Any, named: tuple[str, ...]) -> str:
    """The keys that a method reads, and others that differ from the defaults."""
    plain = type(section)()
    keys = [f.name for f in dataclasses.fields(section) if f.name not in ("method", "kind")]
    shown = [k for k in keys if k in named or getattr(section, k) != getattr(plain, k)]
    return ", ".join(f"{key} {_value(getattr(section, key))}" for key in shown)


def _value(value: Any) -> str:
    return _shares(value) if isinstance(value, dict) else str(value)
