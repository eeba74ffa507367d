"""``llmtrain doctor``."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

import llmtrain
from llmtrain.errors import EXIT_BAD_INPUT, EXIT_OK

HELP = "what works on this machine, and why the rest does not"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the subcommand."""
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(args: argparse.Namespace) -> int:
    """Run the subcommand; returns 0 when training is possible here, else 2."""
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
