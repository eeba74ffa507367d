"""``llmtrain report RUN [RUN ...]``."""

from __future__ import annotations

import argparse
from pathlib import Path

from llmtrain.errors import EnvironmentFault

HELP = "write the HTML report of one run, or of several laid over each other"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the subcommand."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run")
    parser.add_argument(
        "--out",
        metavar="FILE",
        help="where the page goes (default: RUN/report.html, of several runs: report.html)",
    )


def run(args: argparse.Namespace) -> int:
    """Run the subcommand; returns the exit code."""
    from llmtrain.report import read_runs, render, summary

    paths = [Path(path) for path in args.runs]
    runs = read_runs(paths)
    default = paths[0] / "report.html" if len(paths) == 1 else Path("report.html")
    out = Path(args.out) if args.out else default
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(render(runs), encoding="utf-8")
    except OSError as error:
        raise EnvironmentFault(f"{out}: cannot write the report ({error.strerror})") from error
    print(summary(runs))
    print(f"report: {out}")
    return 0
