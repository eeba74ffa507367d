"""``llmtrain doctor``."""

from __future__ import annotations

import argparse
import json
import os
import platform
from dataclasses import asdict
from pathlib import Path

import llmtrain
from llmtrain.errors import EXIT_BAD_INPUT, EXIT_OK, ConfigError

HELP = "what works on this machine, and why the rest does not"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the subcommand."""
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--health",
        action="store_true",
        help="only: is this node fit to train now? Under torchrun or srun also an all-reduce "
        "across the nodes, with its bandwidth",
    )
    parser.add_argument(
        "--gpus", type=int, metavar="N", help="with --health: GPUs that must be there and idle (0)"
    )
    parser.add_argument(
        "--folder", metavar="RUN", help="with --health: where checkpoints will be written (.)"
    )
    parser.add_argument(
        "--least-bandwidth",
        type=float,
        metavar="GB/S",
        help="with --health: an all-reduce slower than this is a fault",
    )


def run(args: argparse.Namespace) -> int:
    """Run the subcommand; returns 0 when training is possible here, else 2."""
    if args.health:
        return _node(args)
    for option in ("gpus", "folder", "least_bandwidth"):
        if getattr(args, option) is not None:
            raise ConfigError(f"--{option.replace('_', '-')} goes with --health; leave it away")
    from llmtrain.cli.diagnosis import diagnose

    checks = []
    if not args.json:
        print(f"llmtrain {llmtrain.__version__}")
    for check in diagnose():
        checks.append(check)
        if not args.json:
            print(
                f"  {'yes' if check.works else 'no ':<5}{check.name:<17}{check.detail}", flush=True
            )
    broken = [check.name for check in checks if check.needed and not check.works]
    if args.json:
        print(json.dumps({"version": llmtrain.__version__, "checks": list(map(asdict, checks))}))
    elif broken:
        print(f"Training cannot work here before this is put right: {', '.join(broken)}.")
    else:
        print("Training works here.")
    return EXIT_BAD_INPUT if broken else EXIT_OK


def _node(args: argparse.Namespace) -> int:
    """The health check of one node, and of the links where several processes were started."""
    from llmtrain.launch.health import check_node, check_world_health

    first_here = os.environ.get("LOCAL_RANK", "0") == "0"
    gpus, folder = args.gpus or 0, Path(args.folder or ".")
    name = os.environ.get("SLURMD_NODENAME", platform.node())
    lines: list[str] = []
    faults: list[str] = []
    if first_here:
        report = check_node(gpus, folder)
        lines, faults = report.lines, report.faults
    # Before torch joins the others, so that what this node lacks is said in any case.
    for line in lines:
        print(f"{name}: {line}", flush=True)
    for fault in faults:
        print(f"{name}: NOT FIT: {fault}", flush=True)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        said, more = check_world_health(gpus > 0, not faults, args.least_bandwidth)
        faults = [*faults, *more]
        if os.environ.get("RANK") == "0":
            for line in [*said, *(f"NOT FIT: {fault}" for fault in more)]:
                print(f"all nodes: {line}", flush=True)
    return EXIT_BAD_INPUT if faults else EXIT_OK
