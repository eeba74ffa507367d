"""Making the runs of an experiment, each once; what is done is read back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmtrain.config import Duration, RunConfig, from_dict
from llmtrain.config.diff import diff_configs
from llmtrain.data.prepare import prepare
from llmtrain.errors import ConfigError
from llmtrain.eval.scoring import Request, score
from llmtrain.parallel import World, close_world, init_world
from llmtrain.recipes.experiment import Experiment, Scoring, Trial, mini_corpus, slug
from llmtrain.recipes.plot import svg
from llmtrain.recipes.results import Losses, report_lines
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
    if seeds < 2:
        raise ConfigError("--seeds: at least 2, or there is no noise to compare with")
    corpus = mini_corpus(out)
    section = from_dict({"prepare": corpus}).prepare
    assert section is not None
    prepare(section, say=say)
    losses: Losses = {}
    world = init_world("cpu")
    try:
        for seed in range(1, seeds + 1):
            folders: dict[str, Path] = {}
            for trial in experiment.trials("mini"):
                say(f"{experiment.name}: {trial.label}, seed {seed} of {seeds}")
                where = (out, seed, corpus["out"])
                folders[trial.label] = _make(experiment, trial, where, folders, world)
                losses.setdefault(trial.label, []).append(_losses(folders[trial.label]))
    finally:
        close_world()
    lines = report_lines(experiment, losses, "mini")
    (out / f"{experiment.name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (out / f"{experiment.name}.json").write_text(json.dumps(losses, indent=1), encoding="utf-8")
    drawing = svg(experiment.title, losses, experiment.baseline)
    (out / f"{experiment.name}.svg").write_text(drawing, encoding="utf-8")
    return lines


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
        cfg = from_dict(data, for_training=True)
        if not done(cfg, out / name):
            train(cfg, world)
        return out / name
    point = find_point(folders[trial.trunk], Duration.parse(trial.at))
    branch, _ = plan_branch(point, None, [*trial.overrides, f"name={name}"])
    if not done(branch.cfg, branch.folder):
        start(branch, world)
    return branch.folder


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
    return {d.name: d.loss for d in domain_results(read_run(folder))}
