"""``llmtrain data prepare|inspect|plan|seen|score``."""

from __future__ import annotations

import argparse

HELP = "make, look at, plan and score training data"
SCORES = (
    *("el2n", "grand", "perplexity", "token-losses"),
    *("grand-full", "influence", "influence-gradient"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the subcommand."""
    actions = parser.add_subparsers(
        dest="action", required=True, metavar="prepare|inspect|plan|seen|score"
    )
    prepare = actions.add_parser("prepare", help="text to shards, as the section `prepare` says")
    _add_config(prepare)
    prepare.add_argument("--workers", type=int, metavar="N", help="processes; default: the cores")
    prepare.add_argument(
        "--force", action="store_true", help="replace a complete corpus, whatever its settings"
    )
    inspect = actions.add_parser("inspect", help="what a corpus or a tokenized source holds")
    inspect.add_argument("path", help="corpus folder, or a source in any readable format")
    inspect.add_argument("--samples", type=int, default=3, metavar="N", help="excerpts shown")
    inspect.add_argument("--verify", action="store_true", help="compare all with recorded hashes")
    inspect.add_argument("--tokenizer", metavar="PATH", help="decode with this one")
    inspect.add_argument("--format", default="auto", help="format, where it cannot be guessed")
    inspect.add_argument("--dtype", help="token dtype of raw files")
    inspect.add_argument("--eos-id", type=int, metavar="ID", help="token that ends a document")
    inspect.add_argument(
        "--duplicates",
        nargs="?",
        type=float,
        const=0.8,
        metavar="SIMILARITY",
        help="count copies and near copies of documents (default similarity: 0.8)",
    )
    inspect.add_argument(
        "--benchmark",
        nargs="+",
        default=[],
        metavar="FILE",
        help="count how much of these texts (.jsonl, or an item a line) occurs in the documents",
    )
    inspect.add_argument(
        "--ngram", type=int, default=13, metavar="N", help="words that must match (default: 13)"
    )
    plan = actions.add_parser("plan", help="tokens, epochs and share per source and phase")
    _add_config(plan)
    seen = actions.add_parser("seen", help="what a run is trained on between two points")
    seen.add_argument("trained", metavar="RUN", help="folder of a run")
    seen.add_argument(
        "--between",
        nargs=2,
        required=True,
        metavar=("FROM", "TO"),
        help="durations, such as 100step 200step, 1.5Mtok 2Mtok or 0.8dur 1dur",
    )
    seen.add_argument(
        "--list", metavar="FILE", help="write a JSON line for every sample: its source and number"
    )
    _add_score(actions.add_parser("score", help="a number for every sample, by a trained model"))


def _add_score(score: argparse.ArgumentParser) -> None:
    score.add_argument("target", help="a config, a run or a checkpoint: what data is scored")
    score.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides")
    score.add_argument("--method", required=True, choices=SCORES, help="what is measured")
    score.add_argument("--out", required=True, metavar="FILE", help="parquet file to write")
    score.add_argument(
        "--checkpoint",
        action="append",
        default=[],
        metavar="PATH",
        help="a run or checkpoint that scores; several are averaged; default: the target itself",
    )
    score.add_argument(
        "--lr", type=float, default=0.01, help="influence: size of the one gradient step"
    )
    score.add_argument(
        "--tensor", type=int, default=1, metavar="N", help="processes that share one model"
    )
    score.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides")


def run(args: argparse.Namespace) -> int:
    """Run the subcommand; returns the exit code."""
    actions = {"prepare": _prepare, "inspect": _inspect, "plan": _plan, "seen": _seen}
    actions["score"] = _score
    return actions[args.action](args)


def _prepare(args: argparse.Namespace) -> int:
    from llmtrain.config import load_config
    from llmtrain.config.load import any_length
    from llmtrain.data.prepare import prepare
    from llmtrain.errors import ConfigError

    cfg = load_config(args.config, args.overrides, epochs=any_length)
    if cfg.prepare is None:
        raise ConfigError(
            f"{args.config} has no section `prepare`; take configs/corpus/builtin.yaml as a model"
        )
    if args.workers is not None and args.workers < 1:
        raise ConfigError(f"--workers must be at least 1, not {args.workers}")
    prepare(cfg.prepare, workers=args.workers, force=args.force, say=_say)
    print(f"corpus ready: {cfg.prepare.out}")
    return 0


def _inspect(args: argparse.Namespace) -> int:
    from pathlib import Path

    from llmtrain.config.schema import SourceConfig
    from llmtrain.data.compare import Comparison
    from llmtrain.data.inspect import Inspection, inspect
    from llmtrain.errors import ConfigError

    for key in ("format", "dtype"):
        allowed = SourceConfig.__dataclass_fields__[key].metadata["choices"]
        if getattr(args, key) not in allowed:
            have = ", ".join(filter(None, allowed))
            raise ConfigError(f"--{key} {getattr(args, key)} is not known; choose from {have}")
    source = SourceConfig(path=args.path, format=args.format, dtype=args.dtype)
    if args.duplicates is not None and not 0 < args.duplicates <= 1:
        raise ConfigError(f"--duplicates must be above 0 and at most 1, not {args.duplicates:g}")
    if args.ngram < 1:
        raise ConfigError(f"--ngram must be at least 1, not {args.ngram}")
    wanted = Comparison(args.duplicates, [Path(file) for file in args.benchmark], args.ngram)
    what = Inspection(
        source,
        args.tokenizer,
        args.eos_id,
        max(args.samples, 0),
        args.verify,
        wanted if args.duplicates is not None or args.benchmark else None,
    )
    for line in inspect(what):
        print(line)
    return 0


def _plan(args: argparse.Namespace) -> int:
    from llmtrain.cli.process import load_run
    from llmtrain.data.plan import plan_report

    print(plan_report(load_run(args)))
    return 0


def _seen(args: argparse.Namespace) -> int:
    from pathlib import Path

    from llmtrain.config import Duration
    from llmtrain.data.seen import Seen, write_list
    from llmtrain.errors import ConfigError

    try:
        low, high = (Duration.parse(text) for text in args.between)
    except ValueError as error:
        raise ConfigError(f"--between: {error}") from error
    seen = Seen.of_run(Path(args.trained), low, high)
    for line in seen.lines():
        print(line)
    if args.list is not None:
        write_list(seen, Path(args.list))
        print(f"written: {args.list}")
    return 0


def _score(args: argparse.Namespace) -> int:
    from pathlib import Path

    from llmtrain.cli.process import prepare_process
    from llmtrain.errors import ConfigError

    for name, low in (("lr", 0.0), ("tensor", 0)):
        if not getattr(args, name) > low:
            raise ConfigError(f"--{name} must be above {low}, not {getattr(args, name)}")
    prepare_process()
    from llmtrain.eval.scoring import Request, score

    checkpoints = [Path(path) for path in args.checkpoint]
    where = (Path(args.target), args.overrides, checkpoints)
    score(Request(*where, args.method, Path(args.out), args.device, args.tensor, args.lr), _say)
    return 0


def _say(line: str) -> None:
    print(line, flush=True)
