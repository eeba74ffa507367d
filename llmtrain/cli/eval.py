"""``llmtrain eval CHECKPOINT``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from llmtrain.cli.process import prepare_process

HELP = "held-out loss of a trained model, by domain"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the subcommand."""
    parser.add_argument("checkpoint", help="a checkpoint, or a run's folder for its newest one")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="changes to the run's config, e.g. data.corpus=data/other eval.samples=500",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))


def run(args: argparse.Namespace) -> int:
    """Run the subcommand; returns the exit code."""
    prepare_process()
    from llmtrain.eval.checkpoint import evaluate_checkpoint
    from llmtrain.parallel import close_world, init_world
    from llmtrain.train.console import table

    world = init_world(args.device)
    try:
        result = evaluate_checkpoint(Path(args.checkpoint), args.overrides, args.device, world)
    finally:
        close_world()
    if not world.is_main:
        return 0
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
