"""``llmtrain branch RUN --at 0.8dur [TAIL.yaml ...] [key=value ...]``."""

from __future__ import annotations

import argparse
import os
import shlex
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from llmtrain.cli.process import prepare_process
from llmtrain.errors import ConfigError

if TYPE_CHECKING:
    from llmtrain.config import Duration
    from llmtrain.train.tails import Study

HELP = "go on from a point of a run with another tail"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the subcommand."""
    parser.add_argument("trunk", metavar="RUN", help="folder of the run to leave")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="TAIL.yaml|key=value",
        help="what the branch changes: YAML files, a branch each, and overrides for all of them. "
        "data.weights or data.phases describe the mixture from the branch point on",
    )
    parser.add_argument(
        "--at", metavar="DURATION", help="where to leave, such as 0.8dur; a checkpoint is there"
    )
    parser.add_argument(
        "--sweep",
        metavar="D,D,...",
        help="instead of --at: the tail over the last D of the run, for each D (0.05,0.1,0.2)",
    )
    parser.add_argument(
        "--leave-one-out",
        action="store_true",
        help="train the tail, and the tail without each of its sources; print what each is worth",
    )
    parser.add_argument(
        "--skill-graph",
        metavar="FILE",
        help="train on each source alone for a while, and write how much it helps every other: "
        "the online.graph_file of Skill-it",
    )
    parser.add_argument(
        "--for", dest="length", metavar="DURATION", help="with --skill-graph: how long (0.02dur)"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the branches and a command line for each alone, and start nothing",
    )


def run(args: argparse.Namespace) -> int:
    """Run the subcommand; returns the exit code."""
    if not args.dry_run:
        prepare_process()
    if args.skill_graph is not None:
        return _skill_graph(args)
    if args.length is not None:
        raise ConfigError("--for goes with --skill-graph; leave it away")
    study = _study(args)
    from llmtrain.train.tails import describe, run_study

    if not args.dry_run:
        run_study(study, _say)
        return 0
    for line in describe(study):
        _say(line)
    return 0


def _skill_graph(args: argparse.Namespace) -> int:
    from llmtrain.train.skill_graph import alone, learn_graph, plan_graph

    if args.sweep is not None or args.leave_one_out or args.at is None:
        raise ConfigError("--skill-graph goes with --at, and with neither --sweep nor others")
    tails = [word for word in args.overrides if "=" not in word]
    if tails:
        raise ConfigError(f"--skill-graph takes no tail, but {tails[0]} was given; use key=value")
    at, length = _duration(args.at), _duration(args.length or "0.02dur", "--for")
    file = Path(args.skill_graph)
    if not file.parent.is_dir():
        raise ConfigError(f"--skill-graph {file}: {file.parent} does not exist; make it first")
    branches = plan_graph(Path(args.trunk), at, length, args.overrides)
    if not args.dry_run:
        learn_graph(branches, file, _say)
        return 0
    for name, branch in branches:
        _say(f"{branch.folder}: {name} alone until {branch.cfg.train.stop_after}")
        words = ["llmtrain", "branch", args.trunk, "--at", args.at, *args.overrides]
        words += [*alone(name, str(branch.cfg.train.stop_after)), f"name={branch.cfg.name}"]
        _say(f"  {shlex.join(words)}")
    return 0


def _study(args: argparse.Namespace) -> Study:
    from llmtrain.train.tails import plan_leave_one_out, plan_sweep, plan_tails

    overrides = [word for word in args.overrides if "=" in word]
    tails = [Path(word) for word in args.overrides if "=" not in word]
    trunk = Path(args.trunk)
    for tail in tails:
        if not tail.is_file():
            raise ConfigError(f"{tail}: no such file; name a YAML file, or write key=value")
    alone = args.sweep is not None or args.leave_one_out
    if alone and len(tails) > 1:
        raise ConfigError("--sweep and --leave-one-out take one TAIL.yaml")
    if args.sweep is not None:
        if args.at is not None or args.leave_one_out:
            raise ConfigError("--sweep stands alone: it says itself where the branches leave")
        return plan_sweep(trunk, _shares(args.sweep), tails[0] if tails else None, overrides)
    if args.at is None:
        raise ConfigError("--at is missing: say where to leave the run, such as --at 0.8dur")
    at = _duration(args.at)
    if args.leave_one_out:
        return plan_leave_one_out(trunk, at, tails[0] if tails else None, overrides)
    return plan_tails(trunk, at, tails, overrides)


def _duration(text: str, key: str = "--at") -> Duration:
    from llmtrain.config import Duration

    try:
        return Duration.parse(text)
    except ValueError as error:
        raise ConfigError(f"{key}: {error}") from error


def _shares(text: str) -> list[Fraction]:
    try:
        return [Fraction(part.strip()) for part in text.split(",")]
    except (ValueError, ZeroDivisionError) as error:
        raise ConfigError(
            f"--sweep: {text!r} is no list of shares; write numbers such as 0.05,0.1,0.2"
        ) from error


def _say(line: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(line, flush=True)
