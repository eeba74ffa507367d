"""Making the runs of an experiment, each once; what is done is read back."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llmtrain.config import Duration, RunConfig, from_dict
from llmtrain.config.diff import diff_configs
from llmtrain.data.prepare import prepare
from llmtrain.errors import ConfigError
from llmtrain.eval.scoring import Request, score
from llmtrain.finetune.lottery import run_lottery
from llmtrain.finetune.plan import plan_sequence
from llmtrain.finetune.sequence import RESULT, run_sequence
from llmtrain.parallel import World, close_world, init_world
from llmtrain.recipes.experiment import Experiment, Scoring, Trial, mini_corpus, slug
from llmtrain.recipes.plot import svg
from llmtrain.recipes.results import Losses, report_lines
from llmtrain.recipes.sweep import sweep_lines, sweep_svg
from llmtrain.report.read import read_run
from llmtrain.report.summary import domain_results
from llmtrain.train.branch import find_point, plan_branch, start
from llmtrain.train.run import train

Say = Callable[[str], None]


def run_mini(experiment: Experiment, out: Path, seeds: int, say: Say) -> list[str]:
    """Make the miniature runs that are missing under ``out``; returns the lines of the result.

    Broken off, it goes on. Beside the runs it writes ``<name>.txt``, ``.json`` and ``.svg``.
    Raises LlmtrainError.
    """
    if seeds < 2 and experiment.sweep is None and experiment.seeds > 1:
        raise ConfigError("--seeds: at least 2, or there is no noise to compare with")
    corpus = (experiment.corpus or mini_corpus)(out)
    section = from_dict({"prepare": corpus}).prepare
    assert section is not None
    prepare(section, say=say)
    losses: Losses = {}
    made: dict[str, list[Path]] = {}
    world = init_world("cpu")
    try:
        for seed in range(1, seeds + 1):
            folders: dict[str, Path] = {}
            for trial in experiment.trials("mini"):
                say(f"{experiment.name}: {trial.label}, seed {seed} of {seeds}")
                where = (out, seed, corpus["out"])
                folders[trial.label] = _make(experiment, trial, where, folders, world)
                losses.setdefault(trial.label, []).append(_losses(folders[trial.label]))
                made.setdefault(trial.label, []).append(folders[trial.label])
    finally:
        close_world()
    data: Any = losses
    if experiment.study is not None:
        lines, drawing, data = experiment.study(losses, made)
    else:
        costs = experiment.costs(made) if experiment.costs is not None else ()
        lines, drawing = _result(experiment, losses, costs)
    (out / f"{experiment.name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (out / f"{experiment.name}.json").write_text(json.dumps(data, indent=1), encoding="utf-8")
    (out / f"{experiment.name}.svg").write_text(drawing, encoding="utf-8")
    return lines


def _result(
    experiment: Experiment, losses: Losses, costs: Sequence[str] = ()
) -> tuple[list[str], str]:
    """The lines and the drawing of finished runs."""
    sweep = experiment.sweep
    if sweep is None:
        drawing = svg(experiment.title, losses, experiment.baseline)
        return report_lines(experiment, losses, "mini", costs), drawing
    lines = sweep_lines(experiment.title, sweep, losses, experiment.paper)
    return lines, sweep_svg(experiment.title, sweep, losses)


def _make(
    experiment: Experiment,
    trial: Trial,
    where: tuple[Path, int, str],
    folders: dict[str, Path],
    world: World,
) -> Path:
    """Train one trial unless it is done; returns the run's folder."""
    out, seed, corpus = where
    name = f"{experiment.name}-{slug(trial.label)}-s{seed}"
    if trial.trunk is None:
        data: dict[str, Any] = {**trial.config, "name": name, "out": str(out), "seed": seed}
        data["data"] = {**data["data"], "corpus": corpus}
        if trial.scoring is not None:
            file = out / f"{experiment.name}-{trial.scoring.method}-s{seed}.parquet"
            _score(trial.scoring, folders, file, world)
            select = {**data["data"]["select"], "scores": str(file)}
            data["data"] = {**data["data"], "select": select}
        if trial.begins is not None:
            data["init"] = {"path": str(folders[trial.begins])}
        if "continual" in data:
            return _sequence(trial, data, folders, world)
        if "lottery" in data:
            cfg = from_dict({**data, "name": f"{experiment.name}-s{seed}"}, for_training=True)
            run_lottery(cfg, lambda line: None, world)
            return out / cfg.name / f"level-{trial.level:02d}"
        cfg = from_dict(data, for_training=True)
        if not done(cfg, out / name):
            train(cfg, world)
        return out / name
    point = find_point(folders[trial.trunk], Duration.parse(trial.at))
    branch, _ = plan_branch(point, None, [*trial.overrides, f"name={name}"])
    if not done(branch.cfg, branch.folder):
        start(branch, world)
    return branch.folder


def _sequence(trial: Trial, data: dict[str, Any], folders: dict[str, Path], world: World) -> Path:
    """Run a sequence of tasks, as far as it is not done; shared runs are links to the others'."""
    sequence = plan_sequence(from_dict(data))
    sequence.folder.mkdir(parents=True, exist_ok=True)
    for name, label in trial.shares.items():
        link = sequence.folder / name
        if not link.is_symlink():
            link.symlink_to(os.path.relpath(folders[label] / name, sequence.folder))
    run_sequence(sequence, lambda line: None, world)
    return sequence.folder


def _score(scoring: Scoring, folders: dict[str, Path], file: Path, world: World) -> None:
    """Score the samples of the run ``scoring.by``, unless it is done."""
    if not file.exists():
        point = find_point(folders[scoring.by], Duration.parse(scoring.at))
        score(Request(point.checkpoint, [], [], scoring.method, file), lambda line: None, world)


def done(cfg: RunConfig, folder: Path) -> bool:
    """Whether the run in ``folder`` has ended; ConfigError when it is a run of other settings."""
    file = folder / "config.yaml"
    if not file.exists():
        return False
    from llmtrain.config import load_config

    differs = diff_configs(load_config(file), cfg)
    if differs:
        raise ConfigError(
            f"{folder} was made with other settings ({differs[0]}); delete it, or give another "
            "folder with --out"
        )
    evals = read_run(folder).evals
    steps = cfg.train.duration.steps(cfg.train.global_batch_size * cfg.data.seq_len)
    return bool(evals) and evals[-1]["step"] >= steps


def _losses(folder: Path) -> dict[str, float]:
    result = folder / RESULT
    if result.exists():
        rows = json.loads(result.read_text(encoding="utf-8"))["rows"]
        return dict(rows[-1]["losses"])
    return {d.name: d.loss for d in domain_results(read_run(folder))}
