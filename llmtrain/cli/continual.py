"""``llmtrain continual CONFIG [key=value ...]``."""

from __future__ import annotations

import argparse
import os

from llmtrain.cli.process import load_run, prepare_process

HELP = "train on several tasks in sequence, and measure what is forgotten"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the subcommand."""
    parser.add_argument("config", help="YAML file of a run with a section `continual`")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="dotted overrides, e.g. continual.method=ewc continual.tasks.1.duration=200step",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the tasks' runs and merges, start nothing"
    )


def run(args: argparse.Namespace) -> int:
    """Run the subcommand; returns the exit code."""
    prepare_process()
    from llmtrain.finetune.fit import check_fit
    from llmtrain.finetune.plan import plan_sequence
    from llmtrain.finetune.sequence import finished, run_sequence
    from llmtrain.finetune.show import describe

    sequence = plan_sequence(load_run(args))
    if args.dry_run:
        check_fit(sequence)
        for line in describe(sequence, finished):
            _say(line)
        return 0
    run_sequence(sequence, _say)
    return 0


def _say(line: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(line, flush=True)
