"""Merges that are judged by our own evaluation: greedy soups and coefficient search."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from llmtrain.checkpoint.store import temporary_beside
from llmtrain.config import load_config
from llmtrain.config.dump import to_dict
from llmtrain.config.yamlfile import scalar
from llmtrain.data.catalogue import open_catalogue
from llmtrain.errors import CheckpointError, ConfigError
from llmtrain.eval.checkpoint import evaluate_checkpoint
from llmtrain.merge.fisher import write_fisher
from llmtrain.merge.offline import merge_models
from llmtrain.merge.recipe import MergeRecipe, ignored, read_recipe, reads
from llmtrain.merge.sources import Source, open_source, require_ours


class Judge:
    """Held-out loss of models. domains: those that count, None for the mean of all.

    device: auto, cpu or cuda. say: called with a line per model judged. warn: as of
    ``merge_models``.
    """

    def __init__(
        self,
        domains: Sequence[str] | None,
        device: str,
        say: Callable[[str], None],
        warn: Callable[[str], None] | None = None,
    ) -> None:
        self.domains, self.device, self.say, self.warn = domains, device, say, warn

    def check(self, source: Source) -> None:
        """Raise unless merges that take their settings from ``source`` can be judged."""
        require_ours(source, "held-out text")
        if "config.yaml" not in source.files:
            raise CheckpointError(
                f"{source.path} has no config.yaml, so its held-out text is unknown; give a "
                "checkpoint that llmtrain train saved"
            )
        cfg = load_config(source.path / "config.yaml")
        self._wanted(list(open_catalogue(cfg).heldout), source.path)

    def _wanted(self, found: list[str], path: Path) -> list[str]:
        """The domains that count, of those a model has."""
        if not found:
            raise CheckpointError(
                f"{path} has no held-out text; prepare it with heldout_fraction above 0"
            )
        unknown = [d for d in self.domains or () if d not in found]
        if unknown:
            raise ConfigError(
                f"--domain: {path} has no held-out domain {unknown[0]!r}; it has {', '.join(found)}"
            )
        return found if self.domains is None else list(self.domains)

    def loss(self, path: Path, name: str) -> float:
        """Mean held-out loss of a checkpoint, infinite where it is NaN.

        Raises ConfigError for an unknown domain.
        """
        found = evaluate_checkpoint(path, (), self.device).domains
        wanted = self._wanted(list(found), path)
        mean = math.fsum(found[d]["loss"] for d in wanted) / len(wanted)
        self.say(f"{name}: held-out loss {mean:.4f}")
        # NaN is neither less nor more than another loss, so it could come out as the best.
        return math.inf if math.isnan(mean) else mean

    def merged_loss(self, recipe: MergeRecipe, near: Path, name: str) -> float:
        """Held-out loss of a merge, which is made beside ``near`` and removed again."""
        with _scratch(near) as folder, estimated_fishers(recipe, near, self.device) as fishers:
            merged = merge_models(recipe, folder / "merged", fishers, self.warn)
            return self.loss(merged.path, name)


def pinned(recipe: MergeRecipe, judge: Judge, judged: bool) -> MergeRecipe:
    """The recipe with the newest good checkpoint in place of each run, so that all that follows
    looks at the same one.

    judged: merges will be evaluated. Raises CheckpointError, before anything is written, for
    models whose merge cannot be evaluated or whose Fisher information cannot be estimated.
    """

    def pin(path: str, lacking: str | None) -> Source:
        source = open_source(path)
        if lacking is not None:
            require_ours(source, lacking)
        if judge.warn is not None:
            source.tell(judge.warn)
        return source

    text = "held-out text" if judged else None
    base = pin(recipe.base_model, text) if recipe.base_model else None
    sources = []
    for model in recipe.models:
        estimated = recipe.method == "fisher" and model.fisher is None
        sources.append(pin(model.path, "training data" if estimated else text))
    if judged:
        judge.check(base or sources[0])
    models = [replace(m, path=str(s.path)) for m, s in zip(recipe.models, sources, strict=True)]
    return replace(recipe, base_model=str(base.path) if base else None, models=models)


@contextmanager
def _scratch(near: Path) -> Iterator[Path]:
    """A name for a folder beside ``near`` that is gone afterwards."""
    folder = temporary_beside(near)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def estimated_fishers(recipe: MergeRecipe, near: Path, device: str) -> Iterator[list[Path]]:
    """Folders of Fisher information of the models, estimated where the recipe names none."""
    if recipe.method != "fisher":
        yield []
        return
    with _scratch(near) as folder:
        paths = []
        for i, model in enumerate(recipe.models):
            if model.fisher is not None:
                paths.append(Path(model.fisher))
                continue
            paths.append(folder / str(i))
            write_fisher(Path(model.path), paths[-1], recipe.fisher_samples, device)
        yield paths


def greedy_soup(recipe: MergeRecipe, near: Path, judge: Judge) -> MergeRecipe:
    """The greedy soup of a recipe's models (Model soups, 2203.05482, recipe 1) as a soup.

    Models in order of held-out loss; each is put in if the mean then has no higher loss.
    """
    losses = {m.path: judge.loss(Path(m.path), m.path) for m in recipe.models}
    ordered = sorted(recipe.models, key=lambda m: losses[m.path])
    chosen, best = ordered[:1], losses[ordered[0].path]
    _require_finite(best)
    for model in ordered[1:]:
        tried = replace(recipe, method="soup", models=[*chosen, model])
        loss = judge.merged_loss(tried, near, f"with {model.path}")
        if loss <= best:
            chosen, best = [*chosen, model], loss
    judge.say(f"greedy soup of {len(chosen)} of {len(ordered)}: held-out loss {best:.4f}")
    return replace(recipe, method="soup", models=chosen)


def _require_finite(best: float) -> None:
    if math.isinf(best):
        raise CheckpointError(
            "no held-out loss of these models is a finite number; give others, or smaller weights"
        )


def search(recipe: MergeRecipe, text: str, near: Path, judge: Judge) -> MergeRecipe:
    """The recipe with the value of a key that gives the least held-out loss.

    text: ``key=v1,v2,...``. Raises ConfigError as ``candidates`` does.
    """
    tried = [
        (judge.merged_loss(candidate, near, name), name, candidate)
        for name, candidate in candidates(recipe, text)
    ]
    loss, name, best = min(tried, key=lambda item: item[0])
    _require_finite(loss)
    judge.say(f"best {name}: held-out loss {loss:.4f}")
    return best


def candidates(recipe: MergeRecipe, text: str) -> list[tuple[str, MergeRecipe]]:
    """``key=value`` and recipe of each value that a search will try.

    text: ``key=v1,v2,...``. Raises ConfigError for keys and values that the recipe has not, or
    that its method does not read.
    """
    key, sign, values = text.partition("=")
    wanted = [v for v in values.split(",") if v.strip()]
    if not sign or not wanted or any(scalar(v) is None for v in wanted):
        raise ConfigError(f"--search: {text!r} is not KEY=V1,V2,...; write beta=0.2,0.5,0.8, say")
    name = key.rpartition(".")[2]
    if not reads(recipe, name):
        raise ConfigError(f"--search: {key}: {ignored(recipe, name)}")
    found = [(f"{key}={v}", read_recipe(None, to_dict(recipe), [f"{key}={v}"])) for v in wanted]
    if any(candidate.method == "greedy-soup" for _, candidate in found):
        raise ConfigError(
            "--search: greedy-soup chooses its models by the held-out loss itself; leave --search "
            "out, or search the weights of a soup"
        )
    return found
