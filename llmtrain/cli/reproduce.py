"""``llmtrain reproduce NAME [--scale mini|small|paper]``."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from typing import TYPE_CHECKING

from llmtrain.cli.process import prepare_process

if TYPE_CHECKING:
    from llmtrain.recipes.experiment import Experiment

HELP = "show a paper's claim in miniature, or write its runs for a cluster"
NAMES = (
    "domain-upsampling",
    "loss-reweighting",
    "data-diet",
    "skill-it",
    "data-ablation",
    "sfa",
    "lora-vs-full",
    "mus-transfer",
    "mus-depth",
    "mus-fp8",
    "precision-scaling-laws",
    "spdf",
    "lottery-ticket",
    "slope",
    "sparse-ift",
    "lost",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the subcommand."""
    parser.add_argument("name", choices=NAMES, help="the experiment")
    parser.add_argument(
        "--scale",
        choices=("mini", "small", "paper"),
        default="mini",
        help="mini trains here, on the built-in corpus; small and paper write configs and SLURM "
        "jobs",
    )
    parser.add_argument(
        "--seeds", type=int, metavar="N", help="runs of each kind (default: 3; sweeps: 1)"
    )
    parser.add_argument(
        "--out", metavar="FOLDER", help="where runs and results go (default: runs/reproduce)"
    )


def run(args: argparse.Namespace) -> int:
    """Run the subcommand; returns the exit code."""
    from llmtrain.errors import ConfigError

    if args.seeds is not None and args.seeds < 1:
        raise ConfigError(f"--seeds must be at least 1, not {args.seeds}")
    if args.scale == "mini":
        prepare_process()
        from llmtrain.recipes.runner import run_mini

        experiment = _experiment(args.name)
        out = Path(args.out or "runs/reproduce")
        for line in run_mini(experiment, out, args.seeds or experiment.seeds, _say):
            _say(line)
        _say(f"written: {out / args.name}.txt, .json, .svg")
        return 0
    from llmtrain.recipes.jobs import write_jobs

    experiment = _experiment(args.name)
    out = Path(args.out or f"runs/reproduce/{args.name}-{args.scale}")
    files = write_jobs(experiment, args.scale, out, args.seeds or experiment.seeds)
    _say(f"{len(files)} files in {out}; fill in the sources' paths in the configs, then run")
    _say(f"  {files[-1]}")
    return 0


def _experiment(name: str) -> Experiment:
    module = importlib.import_module(f"llmtrain.recipes.{name.replace('-', '_')}")
    experiment: Experiment = module.EXPERIMENT
    return experiment


def _say(line: str) -> None:
    print(line, flush=True)
