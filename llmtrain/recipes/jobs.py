"""An experiment at a scale for GPUs: its configs, and SLURM scripts that train them."""

from __future__ import annotations

import shlex
from pathlib import Path

from llmtrain.config import Duration, from_dict, to_yaml
from llmtrain.launch.slurm import script
from llmtrain.recipes.experiment import Experiment, Trial, slug

NODES = {"small": 1, "paper": 8}
GPUS = 8  # of a node


def write_jobs(experiment: Experiment, scale: str, out: Path, seeds: int) -> list[Path]:
    """Configs and scripts under ``out``; ``submit.sh`` submits all, each after what it needs.

    All are held until the last one is submitted: one that is submitted anew, on other nodes, hands
    on those that wait for it, which have to be there. Sources' paths in the configs are to be
    filled in. Returns the files. Raises OSError.
    """
    out.mkdir(parents=True, exist_ok=True)
    files: list[Path] = []
    submit = ["#!/usr/bin/env bash", "set -euo pipefail", 'cd "$(dirname "$0")"']
    held: list[str] = []
    for seed in range(1, seeds + 1):
        jobs: dict[str, tuple[list[str], str]] = {}
        trials = {trial.label: trial for trial in experiment.trials(scale)}
        for trial in trials.values():
            jobs |= _scoring(experiment, trials, trial, seed)
            name = _name(experiment, trial.label, seed)
            jobs[name] = _command(experiment, trial, seed, out, files)
        for name, (command, wait) in jobs.items():
            job = out / f"{name}.sbatch"
            job.write_text(_text(name, NODES[scale], command), encoding="utf-8")
            files.append(job)
            variable = _variable(name)
            # In a federation a cluster's name follows the number.
            after = f'--dependency=afterok:"${{{_variable(wait)}%%;*}}"' if wait else "--hold"
            submit.append(f"{variable}=$(sbatch --parsable {after} {job.name})")
            if not wait:
                held.append(f'"${{{variable}%%;*}}"')
    if experiment.tasks:
        files.append(_tasks(experiment, scale, out, seeds))
    last = out / "submit.sh"
    submit.append(f'for job in {" ".join(held)}; do scontrol release "$job"; done')
    last.write_text("\n".join(submit) + "\n", encoding="utf-8")
    last.chmod(0o755)
    return [*files, last]


def _text(name: str, nodes: int, command: list[str]) -> str:
    """The job of one run; all its paths are seen from the folder of the configs."""
    options = [
        f"job-name={name}",
        f"nodes={nodes}",
        f"ntasks-per-node={GPUS}",
        f"gpus-per-node={GPUS}",
        "cpus-per-task=8",
        "time=24:00:00",
        "signal=B:USR1@300",
        "requeue",
        "open-mode=append",
        "output=%x-%j.log",
    ]
    settings = {
        "run": shlex.quote(f"runs/{name}"),
        "job": f"{name}.sbatch",
        "words": f"({shlex.join(command)})",
        "processes": str(GPUS),
        "gpus": str(GPUS),
    }
    return script(options, settings)


def _tasks(experiment: Experiment, scale: str, out: Path, seeds: int) -> Path:
    """A script for afterwards, on one GPU: the tasks of every run, beside its metrics."""
    lines = ["#!/usr/bin/env bash", "set -euo pipefail", 'cd "$(dirname "$0")"']
    for seed in range(1, seeds + 1):
        for trial in experiment.trials(scale):
            run = f"runs/{_name(experiment, trial.label, seed)}"
            words = ["llmtrain", "eval", run, "--tasks", experiment.tasks, "--json"]
            lines.append(f"{shlex.join(words)} > {run}/tasks.json")
    file = out / "tasks.sh"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    file.chmod(0o755)
    return file


def _scoring(
    experiment: Experiment, trials: dict[str, Trial], trial: Trial, seed: int
) -> dict[str, tuple[list[str], str]]:
    """The job that makes the scores of a trial, by name: (words, the run to wait for)."""
    scoring = trial.scoring
    if scoring is None:
        return {}
    cfg = from_dict(trials[scoring.by].config)
    tokens = cfg.train.global_batch_size * cfg.data.seq_len
    step = Duration.parse(scoring.at).steps(tokens, cfg.train.duration.steps(tokens))
    run, name = _name(experiment, scoring.by, seed), _name(experiment, scoring.method, seed)
    words = ["data", "score", f"runs/{run}/checkpoints/step-{step:08d}"]
    words += ["--method", scoring.method, "--out", f"runs/{name}.parquet"]
    return {name: (words, run)}


def _command(
    experiment: Experiment, trial: Trial, seed: int, out: Path, files: list[Path]
) -> tuple[list[str], str]:
    """(words behind ``llmtrain``, the run to wait for); writes the config of a run of its own."""
    name = _name(experiment, trial.label, seed)
    if trial.trunk is not None:
        trunk = _name(experiment, trial.trunk, seed)
        words = ["branch", f"runs/{trunk}", "--at", trial.at, *trial.overrides, f"name={name}"]
        return words, trunk
    config = out / f"{name}.yaml"
    data, wait = {**trial.config, "name": name, "out": "runs", "seed": seed}, ""
    if trial.scoring is not None:
        wait = _name(experiment, trial.scoring.method, seed)
        select = {**data["data"]["select"], "scores": f"runs/{wait}.parquet"}
        data["data"] = {**data["data"], "select": select}
    if trial.begins is not None:
        wait = _name(experiment, trial.begins, seed)
        data["init"] = {"path": f"runs/{wait}"}
    sequence = "continual" in data
    cfg = from_dict(data, for_training=not sequence)
    config.write_text(to_yaml(cfg), encoding="utf-8")
    files.append(config)
    kinds = {"continual": ["continual"], "lottery": ["sparsity", "lottery"]}
    words = next((w for section, w in kinds.items() if section in data), ["train"])
    return [*words, config.name], wait


def _name(experiment: Experiment, label: str, seed: int) -> str:
    return f"{experiment.name}-{slug(label)}-s{seed}"


def _variable(name: str) -> str:
    return "job_" + "".join(c if c.isalnum() else "_" for c in name)
