"""``llmtrain merge METHOD MODEL [MODEL ...] --out DST`` and ``merge path A B``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtrain.cli.process import prepare_process
from llmtrain.errors import ConfigError

if TYPE_CHECKING:
    from llmtrain.merge.offline import Merged
    from llmtrain.merge.recipe import MergeRecipe

HELP = "merge models into one: soups, task vectors, TIES, Model Stock, ..."
METHODS = (
    "linear, soup, slerp, wise-ft, task-arithmetic, ties, dare, model-stock, fisher, "
    "greedy-soup; path: losses between two checkpoints"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the subcommand."""
    parser.add_argument("method", metavar="METHOD|RECIPE.yaml", help=f"{METHODS}; or a file")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="MODEL|key=value",
        help="checkpoints, runs or Hugging Face folders, and keys of the recipe, e.g. "
        "density=0.2 models.0.weight=0.7",
    )
    parser.add_argument("--base", metavar="MODEL", help="the model the others were trained from")
    parser.add_argument("--out", metavar="DST", required=True, help="folder to create")
    parser.add_argument(
        "--search",
        metavar="KEY=V1,V2,...",
        help="try values of a key and keep the one with the least held-out loss",
    )
    parser.add_argument(
        "--domain",
        action="append",
        metavar="NAME",
        help="held-out domain that greedy-soup and --search look at (default: the mean of all)",
    )
    parser.add_argument(
        "--align",
        action="store_true",
        help="first permute hidden units and heads of the models to match the base or first one",
    )
    parser.add_argument(
        "--points",
        type=int,
        metavar="N",
        help="path: places on the line between the two checkpoints (default: 11)",
    )
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))


def run(args: argparse.Namespace) -> int:
    """Run the subcommand; returns the exit code."""
    prepare_process()
    from llmtrain.merge.offline import RECIPE, merge_models
    from llmtrain.merge.recipe import read_recipe

    out = Path(args.out).expanduser()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out: {out} exists and is not empty; choose another folder")
    if args.method == "path":
        return _path(args, out)
    file, given, changes = _recipe_words(args)
    recipe = read_recipe(file, given, changes)
    _check_flags(args, recipe)
    if args.search is None and recipe.method not in ("greedy-soup", "fisher"):
        merged = merge_models(recipe, out, warn=_warn)
    else:
        recipe, merged = _judged(args, recipe, out)
    print(f"{merged.path}: {len(recipe.paths)} models merged by {recipe.method}")
    for path in merged.files:
        print(f"  {path.name} ({path.stat().st_size / 1e6:,.1f} MB)")
    print(f"  {RECIPE}: the recipe; llmtrain merge {merged.path / RECIPE} --out ... repeats it")
    return 0


def _warn(text: str) -> None:
    print(f"llmtrain: warning: {text}", file=sys.stderr, flush=True)


def _check_flags(args: argparse.Namespace, recipe: MergeRecipe) -> None:
    """Raise ConfigError for a flag that this merge would not look at."""
    judged = args.search is not None or recipe.method == "greedy-soup"
    if args.points is not None:
        raise ConfigError(f"--points: is for path only, not for {recipe.method}; leave it out")
    if args.domain and not judged:
        raise ConfigError(
            f"--domain: {recipe.method} looks at no held-out loss; leave it out, or add --search"
        )
    if args.device == "cuda" and not judged and recipe.method != "fisher":
        raise ConfigError(f"--device: {recipe.method} works on the CPU; leave it out")


def _path(args: argparse.Namespace, out: Path) -> int:
    """``llmtrain merge path A B``: losses between two checkpoints."""
    from llmtrain.merge.path import interpolate, write_curve

    if len(args.overrides) != 2 or args.base is not None or args.search or args.domain:
        raise ConfigError("path takes two checkpoints and --points, --align, --device, --out")
    points = 11 if args.points is None else args.points
    if points < 3:
        raise ConfigError(f"--points: {points} is too few; give at least 3, ends included")
    first, second = (Path(word) for word in args.overrides)

    def say(t: float, loss: float) -> None:
        print(f"t {t:.3f}: held-out loss {loss:.4f}", flush=True)

    curve = interpolate(
        first, second, points, device=args.device, aligned=args.align, say=say, warn=_warn
    )
    written = write_curve(curve, out)
    for name, value in curve.barriers.items():
        print(f"barrier of {name}: {value:.4f}")
    for file in written:
        print(file)
    return 0


def _judged(args: argparse.Namespace, recipe: MergeRecipe, out: Path) -> tuple[MergeRecipe, Merged]:
    """The recipe that evaluation chooses, and its merge."""
    from llmtrain.merge.offline import merge_models
    from llmtrain.merge.search import (
        Judge,
        candidates,
        estimated_fishers,
        greedy_soup,
        pinned,
        search,
    )

    judge = Judge(args.domain, args.device, lambda text: print(text, flush=True), _warn)
    if args.search is not None:
        candidates(recipe, args.search)
    judged = args.search is not None or recipe.method == "greedy-soup"
    recipe = pinned(recipe, judge, judged)
    if args.search is not None:
        recipe = search(recipe, args.search, out, judge)
    if recipe.method == "greedy-soup":
        recipe = greedy_soup(recipe, out, judge)
    with estimated_fishers(recipe, out, args.device) as fishers:
        return recipe, merge_models(recipe, out, fishers, _warn)


def _recipe_words(args: argparse.Namespace) -> tuple[Path | None, dict[str, Any], list[str]]:
    """File, plain data and changes that the words of the command line stand for."""
    from llmtrain.merge.recipe import METHODS as known

    changes = [w for w in args.overrides if _is_change(w)]
    models = [{"path": w} for w in args.overrides if not _is_change(w)]
    given: dict[str, Any] = {}
    if args.align:
        changes.append("align=true")
    if args.base is not None:
        given["base_model"] = args.base
    if args.method in known:
        return None, {"method": args.method, "models": models, **given}, changes
    if not args.method.endswith((".yaml", ".yml")):
        from difflib import get_close_matches

        near = get_close_matches(args.method, known, 1)
        remedy = f"did you mean {near[0]!r}?" if near else f"the methods are {', '.join(known)}"
        raise ConfigError(f"{args.method!r} is no method of merging; {remedy}")
    if models:
        raise ConfigError(
            f"{models[0]['path']}: a recipe file names its models itself; change them with "
            "models.0.path=..."
        )
    return Path(args.method), {}, [*(f"base_model={v}" for v in given.values()), *changes]


def _is_change(word: str) -> bool:
    """``key=value`` and not a path that holds an equals sign."""
    head, sign, _ = word.partition("=")
    return bool(sign) and "/" not in head
