"""Merges that are judged by our own evaluation: greedy soups and coefficient search."""

from __future__ import annotations

import math
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from llmtrain.config.dump import to_dict
from llmtrain.config.yamlfile import scalar
from llmtrain.errors import ConfigError
from llmtrain.eval.checkpoint import evaluate_checkpoint
from llmtrain.merge.fisher import write_fisher
from llmtrain.merge.offline import merge_models
from llmtrain.merge.recipe import MergeRecipe, read_recipe


class Judge:
    """Held-out loss of models. domains: those that count, None for the mean of all.

    device: auto, cpu or cuda. say: called with a line per model judged.
    """

    def __init__(
        self, domains: Sequence[str] | None, device: str, say: Callable[[str], None]
    ) -> None:
        self.domains, self.device, self.say = domains, device, say

    def loss(self, path: Path, name: str) -> float:
        """Mean held-out loss of a checkpoint. Raises ConfigError for an unknown domain."""
        found = evaluate_checkpoint(path, (), self.device).domains
        wanted = list(found) if self.domains is None else list(self.domains)
        unknown = [d for d in wanted if d not in found]
        if unknown or not wanted:
            has = ", ".join(found) or "none"
            raise ConfigError(f"--domain: {path} has no held-out {unknown[:1]}; it has {has}")
        mean = math.fsum(found[d]["loss"] for d in wanted) / len(wanted)
        self.say(f"{name}: held-out loss {mean:.4f}")
        return mean

    def merged_loss(self, recipe: MergeRecipe, near: Path, name: str) -> float:
        """Held-out loss of a merge, which is made beside ``near`` and removed again."""
        with _scratch(near) as folder, estimated_fishers(recipe, near, self.device) as fishers:
            return self.loss(merge_models(recipe, folder, fishers).path, name)


@contextmanager
def _scratch(near: Path) -> Iterator[Path]:
    """A name for a folder beside ``near`` that is gone afterwards."""
    folder = near.parent / f".tmp-{near.name}-{secrets.token_hex(4)}"
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
    for model in ordered[1:]:
        tried = replace(recipe, method="soup", models=[*chosen, model])
        loss = judge.merged_loss(tried, near, f"with {model.path}")
        if loss <= best:
            chosen, best = [*chosen, model], loss
    judge.say(f"greedy soup of {len(chosen)} of {len(ordered)}: held-out loss {best:.4f}")
    return replace(recipe, method="soup", models=chosen)


def search(recipe: MergeRecipe, text: str, near: Path, judge: Judge) -> MergeRecipe:
    """The recipe with the value of a key that gives the least held-out loss.

    text: ``key=v1,v2,...``. Raises ConfigError for keys and values that the recipe has not.
    """
    key, sign, values = text.partition("=")
    wanted = [v for v in values.split(",") if v.strip()]
    if not sign or not wanted or any(scalar(v) is None for v in wanted):
        raise ConfigError(f"--search: {text!r} is not KEY=V1,V2,...; write beta=0.2,0.5,0.8, say")
    tried = []
    for value in wanted:
        candidate = read_recipe(None, to_dict(recipe), [f"{key}={value}"])
        tried.append((judge.merged_loss(candidate, near, f"{key}={value}"), value, candidate))
    loss, value, best = min(tried, key=lambda item: item[0])
    judge.say(f"best {key}={value}: held-out loss {loss:.4f}")
    return best
