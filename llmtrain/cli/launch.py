"""``llmtrain launch slurm CONFIG [key=value ...]`` and ``llmtrain launch status RUN``."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

from llmtrain.cli.process import load_run
from llmtrain.errors import EXIT_OK, ConfigError

HELP = "submit a run to a cluster, and show its jobs"
RUNTIMES = ("pyxis", "apptainer")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the subcommand."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    _add_slurm(actions)
    showing = actions.add_parser("status", help="the jobs of a run, and its newest checkpoint")
    showing.add_argument("run", metavar="RUN", help="folder of the run")


def _add_slurm(actions: Any) -> None:
    parser = actions.add_parser("slurm", help="write the SLURM job of a run and submit it")
    parser.add_argument("config", help="YAML file that describes the run")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="dotted overrides, e.g. optim.lr=3e-4"
    )
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="nodes (1)")
    parser.add_argument(
        "--gpus-per-node", type=int, default=8, metavar="G", help="GPUs a node; 0: CPUs (8)"
    )
    parser.add_argument(
        "--processes-per-node", type=int, metavar="P", help="training processes (one per GPU)"
    )
    parser.add_argument(
        "--time", default="24:00:00", metavar="T", help="limit of one job; the run goes on past it"
    )
    parser.add_argument("--partition", metavar="NAME", help="partition of the cluster")
    parser.add_argument("--container", metavar="IMAGE", help="train in this image")
    parser.add_argument(
        "--container-runtime", choices=RUNTIMES, default="pyxis", help="what runs it (pyxis)"
    )
    parser.add_argument(
        "--mount", action="append", default=[], metavar="SRC:DST", help="more for the container"
    )
    parser.add_argument(
        "--exclude", action="append", default=[], metavar="NODE", help="a node never to use"
    )
    parser.add_argument(
        "--sbatch",
        action="append",
        default=[],
        metavar="OPTION",
        help="any other option of sbatch, such as account=physics",
    )
    parser.add_argument(
        "--warning",
        type=int,
        default=300,
        metavar="S",
        help="seconds before the limit at which the run is told to save (300)",
    )
    parser.add_argument(
        "--no-health-check", action="store_true", help="train without looking at the nodes first"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="write the job, print it, and submit nothing"
    )


def run(args: argparse.Namespace) -> int:
    """Run the subcommand; returns the exit code."""
    return _slurm(args) if args.action == "slurm" else _status(args)


def _slurm(args: argparse.Namespace) -> int:
    from llmtrain.launch.slurm import SlurmJob, prepare_job, submit

    cfg = load_run(args, train=True)
    job = SlurmJob(
        nodes=args.nodes,
        gpus_per_node=args.gpus_per_node,
        processes_per_node=args.processes_per_node,
        time=args.time,
        partition=args.partition,
        container=args.container,
        runtime=args.container_runtime,
        mounts=tuple(args.mount),
        exclude=tuple(args.exclude),
        options=tuple(args.sbatch),
        warning=args.warning,
        health=not args.no_health_check,
    )
    file = prepare_job(cfg, job)
    if args.dry_run:
        print(file.read_text(encoding="utf-8"), end="")
        print(f"# written to {file}; submit it with: sbatch {shlex.quote(str(file))}")
        return EXIT_OK
    number = submit(file)
    print(f"submitted job {number}: {job.nodes} nodes x {job.processes} processes")
    print(f"log          {file.parent / f'{number}.log'}")
    print(f"rank 0       {file.parent / 'logs' / 'rank-0.log'}")
    print(f"status       llmtrain launch status {shlex.quote(str(file.parents[1]))}")
    return EXIT_OK


def _status(args: argparse.Namespace) -> int:
    from llmtrain.launch.slurm import status

    run = Path(args.run)
    if not run.is_dir():
        raise ConfigError(f"{run}: no such folder; name the folder of a run")
    jobs, step = status(run)
    for job in jobs:
        print(f"{job.job:<10}{job.state:<14}{job.detail}".rstrip())
    print("newest checkpoint: " + ("none yet" if step is None else f"step {step}"))
    return EXIT_OK
