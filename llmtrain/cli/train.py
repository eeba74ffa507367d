"""``llmtrain train CONFIG [key=value ...]``."""

from __future__ import annotations

import argparse
import os
import sys

from llmtrain.cli.process import load_run, prepare_process
from llmtrain.errors import LlmtrainError

MOST_PROCESSES = 1 << 17
HELP = "train a model from a YAML file"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the subcommand."""
    parser.add_argument("config", help="YAML file that describes the run")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="dotted overrides, e.g. optim.lr=3e-4"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print model, data plan, memory and layout, and start nothing",
    )
    parser.add_argument(
        "--world",
        type=int,
        metavar="N",
        help="with --dry-run: plan for N processes that need not be here",
    )
    parser.add_argument(
        "--print-config", action="store_true", help="print the resolved YAML, and start nothing"
    )
    parser.add_argument(
        "--resume",
        metavar="auto|never|PATH",
        help="continue from the newest good checkpoint (auto, the default), from none, or from "
        "this one; same as checkpoint.resume=...",
    )


def run(args: argparse.Namespace) -> int:
    """Run the subcommand; returns the exit code."""
    from llmtrain.config import to_yaml

    _check_world(args)
    resume = [] if args.resume is None else [f"checkpoint.resume={args.resume}"]
    if args.print_config:
        sys.stdout.write(to_yaml(load_run(args, resume)))
        return 0
    prepare_process()
    cfg = load_run(args, resume, train=True)
    if args.dry_run:
        from llmtrain.train.dryrun import dry_run

        text = dry_run(cfg, args.world)
        if os.environ.get("RANK", "0") == "0":
            print(text)
        return 0
    from llmtrain.train.run import train

    return train(cfg)


def _check_world(args: argparse.Namespace) -> None:
    if args.world is None:
        return
    if not args.dry_run:
        raise LlmtrainError(
            f"--world {args.world} only plans: add --dry-run, or start {args.world} processes "
            "with torchrun"
        )
    if args.world < 1:
        raise LlmtrainError(f"--world {args.world}: the number of processes is 1 or more")
    if args.world > MOST_PROCESSES:
        raise LlmtrainError(
            f"--world {args.world}: plans go up to {MOST_PROCESSES:,} processes; use fewer"
        )
