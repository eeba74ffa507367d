"""``llmtrain compare BASE MODEL [MODEL ...]``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from llmtrain.cli.process import prepare_process

HELP = "what models learned, forgot and changed against the one they began with"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the subcommand."""
    parser.add_argument("base", help="a run, checkpoint or Hugging Face folder")
    parser.add_argument(
        "models",
        nargs="+",
        metavar="MODEL",
        help="models that came from it; key=value among them changes the data that all are "
        "evaluated on, e.g. data.corpus=data/other",
    )
    parser.add_argument(
        "--matrices",
        action="append",
        metavar="PATTERN",
        help="which matrices' spectra, e.g. 'blocks.*.mlp.*' or embedding; repeat (default: all "
        "of the blocks)",
    )
    parser.add_argument("--no-eval", action="store_true", help="leave held-out losses out")
    parser.add_argument("--no-spectra", action="store_true", help="leave spectra out")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--out", metavar="FOLDER", help="also write compare.json and spectra.svg")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))


def run(args: argparse.Namespace) -> int:
    """Run the subcommand; returns the exit code."""
    from llmtrain.errors import LlmtrainError

    overrides = [word for word in args.models if "=" in word]
    models = [word for word in args.models if "=" not in word]
    if not models:
        raise LlmtrainError("give at least one model besides the base")
    if args.no_eval and args.no_spectra:
        raise LlmtrainError("--no-eval and --no-spectra leave nothing to compare")
    if args.out and Path(args.out).exists() and not Path(args.out).is_dir():
        raise LlmtrainError(f"--out: {args.out} is a file; name a folder")
    prepare_process()
    from llmtrain.analysis.spectra_plot import spectra_svg
    from llmtrain.finetune.compare import Request, compare

    patterns = [] if args.no_spectra else args.matrices or ["blocks.*"]
    request = Request(args.base, models, overrides, not args.no_eval, patterns, args.device)
    found = compare(request, lambda line: print(f"llmtrain: {line}", file=sys.stderr))
    text = json.dumps(found.record(), indent=1)
    print(text if args.json else "\n".join(found.lines()))
    if args.out:
        folder = Path(args.out)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "compare.json").write_text(text + "\n", encoding="utf-8")
        if found.changes:
            (folder / "spectra.svg").write_text(spectra_svg(found.changes), encoding="utf-8")
    return 0
