"""``llmtrain eval CHECKPOINT``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from llmtrain.cli.process import prepare_process

HELP = "held-out loss of a trained model by domain, or tasks"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the subcommand."""
    parser.add_argument("checkpoint", help="a checkpoint, or a run's folder for its newest one")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="changes to the run's config, e.g. data.corpus=data/other eval.samples=500",
    )
    parser.add_argument(
        "--tasks",
        metavar="A,B",
        help="tasks of lm-evaluation-harness instead of held-out loss, e.g. "
        "hellaswag,arc_challenge,winogrande (extra lm-eval)",
    )
    parser.add_argument(
        "--task-folder", metavar="FOLDER", help="tasks: your own, as the harness's YAML files"
    )
    parser.add_argument(
        "--few-shot", type=int, metavar="N", help="tasks: examples before each question"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="tasks: questions of each")
    parser.add_argument(
        "--batch", type=int, default=16, help="tasks: texts computed together (default 16)"
    )
    parser.add_argument(
        "--tensor",
        type=int,
        default=1,
        metavar="N",
        help="tasks, under torchrun: processes that share one model's matrices (default 1)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))


def run(args: argparse.Namespace) -> int:
    """Run the subcommand; returns the exit code."""
    prepare_process()
    if args.tasks is not None:
        return _tasks(args)
    from llmtrain.errors import ConfigError, LlmtrainError
    from llmtrain.eval.checkpoint import evaluate_checkpoint
    from llmtrain.parallel import close_world, init_world
    from llmtrain.train.console import table

    if args.tensor != 1:
        raise LlmtrainError("--tensor is for --tasks; held-out loss takes the whole model")
    world = init_world(args.device)
    try:
        result = evaluate_checkpoint(Path(args.checkpoint), args.overrides, args.device, world)
    finally:
        close_world()
    if not world.is_main:
        return 0
    if not result.domains:
        raise ConfigError(
            f"data.corpus: {result.path} was saved without held-out text; name some, as in "
            "data.corpus=data/corpus"
        )
    for fault in result.warnings:
        print(f"llmtrain: warning: {fault}", file=sys.stderr)
    if args.json:
        print(json.dumps({"checkpoint": str(result.path), "domains": result.domains}, indent=1))
        return 0
    print(f"{result.path} (step {result.step})")
    rows = [("domain", "tokens", "loss", "perplexity", "bits/byte")]
    for name, m in result.domains.items():
        bits = f"{m['bits_per_byte']:.4f}" if "bits_per_byte" in m else "n/a"
        rows.append(
            (name, f"{m['tokens']:.0f}", f"{m['loss']:.4f}", f"{m['perplexity']:.2f}", bits)
        )
    print("\n".join(table(rows)))
    return 0


def _tasks(args: argparse.Namespace) -> int:
    """Tasks; under torchrun the processes share the requests, and the first one prints."""
    from llmtrain.errors import LlmtrainError
    from llmtrain.eval.harness import TaskRequest, evaluate_tasks
    from llmtrain.eval.sharing import PATIENCE_MINUTES, load_together
    from llmtrain.parallel import close_world, init_world
    from llmtrain.train.console import table

    tasks = [task.strip() for task in args.tasks.split(",") if task.strip()]
    if not tasks or args.batch < 1 or args.tensor < 1:
        raise LlmtrainError("--tasks needs a name, and --batch and --tensor must be at least 1")
    world = init_world(args.device, PATIENCE_MINUTES)
    try:
        path = Path(args.checkpoint)
        trained, layout = load_together(path, world, args.tensor, args.overrides)
        for fault in trained.warnings if world.is_main else ():
            print(f"llmtrain: warning: {fault}", file=sys.stderr)
        request = TaskRequest(tasks, args.few_shot, args.limit, args.task_folder, args.batch)
        found = evaluate_tasks(trained, request, layout)
        where, step = str(trained.path), trained.step
        del trained, layout
    finally:
        close_world()
    if found is None:
        return 0
    if args.json:
        print(json.dumps({"checkpoint": where, "tasks": found}, indent=1))
        return 0
    print(f"{where} (step {step})")
    rows = [("task", "metric", "value")]
    for task, numbers in found.items():
        rows += [(task, name, f"{value:.4f}") for name, value in numbers.items()]
    print("\n".join(table(rows)))
    return 0
