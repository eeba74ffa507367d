"""``llmtrain sparsity lottery CONFIG`` and ``llmtrain sparsity sweep CHECKPOINT``."""

from __future__ import annotations

import argparse
from pathlib import Path

from llmtrain.cli.process import load_run, prepare_process

HELP = "lottery tickets, and one-shot pruning of a trained model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the subcommand."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    lottery = actions.add_parser(
        "lottery", help="train, prune by magnitude, rewind and train again, level by level"
    )
    lottery.add_argument("config", help="YAML file of a run with a section `lottery`")
    lottery.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides")
    sweep = actions.add_parser(
        "sweep", help="held-out loss of a checkpoint pruned by magnitude, without training"
    )
    sweep.add_argument("checkpoint", help="a checkpoint, or the folder of a run")
    sweep.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides")
    sweep.add_argument(
        "--densities", help="kept shares, by commas (default: 0.9 down to 0.1; of N:M its own)"
    )
    sweep.add_argument(
        "--granularity", default="unstructured", help="unstructured, 4x4, 2:4 ... (as in sparsity)"
    )


def run(args: argparse.Namespace) -> int:
    """Run the subcommand; returns the exit code."""
    return _lottery(args) if args.action == "lottery" else _sweep(args)


def _lottery(args: argparse.Namespace) -> int:
    prepare_process()
    from llmtrain.finetune.lottery import RESULT, run_lottery
    from llmtrain.train.run import run_folder

    cfg = load_run(args)
    run_lottery(cfg, _say)
    _say(f"written: {run_folder(cfg) / RESULT}")
    return 0


def _sweep(args: argparse.Namespace) -> int:
    from llmtrain.errors import ConfigError

    given, densities = args.densities, None
    try:
        if given is not None:
            densities = [float(text) for text in given.split(",")]
    except ValueError as error:
        raise ConfigError(f"--densities: {error}; write shares such as 0.5,0.25") from error
    prepare_process()
    from llmtrain.eval.pruned import NEARLY, density_sweep, essential
    from llmtrain.train.console import table

    found = density_sweep(
        Path(args.checkpoint), densities, args.granularity, overrides=args.overrides
    )
    rows = [("density", *found[0].losses, "mean", "rise")]
    for one in found:
        losses = (f"{loss:.4f}" for loss in one.losses.values())
        rise = f"{one.mean / found[0].mean - 1:+.2%}"
        rows.append((f"{one.density:g}", *losses, f"{one.mean:.4f}", rise))
    for line in table(rows):
        _say(line)
    sparsity = 1 - essential(found)
    _say(f"essential sparsity (loss within {NEARLY:.0%}): {sparsity:.0%} of the weights can go")
    return 0


def _say(line: str) -> None:
    print(line, flush=True)
