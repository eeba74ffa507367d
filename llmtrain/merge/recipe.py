"""The recipe of a merge: what a YAML file or the command line says, and what the result records."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from llmtrain.config.build import Builder
from llmtrain.config.dump import to_dict
from llmtrain.config.faults import Collector, Fault, Mark, raise_faults
from llmtrain.config.fields import key
from llmtrain.config.merge import Files, apply_overrides
from llmtrain.config.yamlfile import wrap

METHODS = (
    "linear",
    "soup",
    "slerp",
    "wise-ft",
    "task-arithmetic",
    "ties",
    "dare",
    "model-stock",
    "fisher",
    "greedy-soup",
)
# Those that move away from a base model, and those that want exactly one model besides it.
BASED = ("slerp", "wise-ft", "task-arithmetic", "ties", "dare", "model-stock")
PAIRED = ("slerp", "wise-ft")
# Keys of a recipe or a model that only these methods read.
_SUMS = ("task-arithmetic", "ties", "dare")
READ_BY = {
    "t": ("slerp",),
    "beta": ("wise-ft",),
    "scale": _SUMS,
    "density": ("ties", "dare"),
    "normalize": ("linear", "soup", *_SUMS),
    "rescale": ("dare",),
    "sign_election": ("dare",),
    "seed": ("dare",),
    "fisher": ("fisher",),
    "fisher_floor": ("fisher",),
    "fisher_samples": ("fisher",),
    "weight": ("linear", "soup", "fisher", "greedy-soup", *_SUMS),
}
# Weights that cancel to this share of their magnitudes leave nothing of a float32.
_CANCELS = 1e-7


@dataclass(frozen=True)
class ModelEntry:
    """One of the models of a merge."""

    path: str = key("", "a checkpoint, a run, or a folder with safetensors files")
    weight: float | None = key(None, "its weight; null: 1")
    density: float | None = key(
        None, "ties, dare: share of its changes that stays; null: the recipe's", ge=0, le=1
    )
    fisher: str | None = key(
        None, "fisher: folder with its diagonal Fisher information; null: estimated"
    )


@dataclass(frozen=True)
class MergeRecipe:
    """How to merge models."""

    method: str = key("linear", "the rule", choices=METHODS)
    base_model: str | None = key(None, "the model the others were trained from")
    models: list[ModelEntry] = key(list, "the models")
    t: float = key(0.5, "slerp: place between base (0) and model (1)", ge=0, le=1)
    beta: float = key(0.5, "wise-ft: weight of the base model", ge=0, le=1)
    scale: float = key(1.0, "task-arithmetic, ties, dare: factor lambda on the merged change")
    density: float = key(1.0, "ties, dare: share of each model's changes that stays", ge=0, le=1)
    normalize: bool | None = key(
        None, "divide by the sum of the weights; null: linear, soup and ties do, others do not"
    )
    rescale: str = key(
        "density",
        "dare: make up for dropped changes: divide by density (the paper), or keep the l1 norm",
        choices=("density", "l1", "none"),
    )
    sign_election: bool = key(False, "dare: elect signs as TIES does")
    seed: int = key(0, "dare: draws the changes that are dropped", ge=0)
    fisher_floor: float = key(1e-6, "fisher: least information of a weight", gt=0)
    fisher_samples: int = key(64, "fisher: sequences of each model's training data", ge=1)
    align: bool = key(
        False, "first permute hidden units and heads of the models to match the base (or first) one"
    )
    dtype: str | None = key(
        None, "of the result; null: as the first", choices=("fp32", "bf16", "fp16", None)
    )
    shard_bytes: int = key(5 << 30, "largest file of the result", ge=1)

    @property
    def weights(self) -> list[float]:
        """Weight of each model."""
        return [1.0 if m.weight is None else m.weight for m in self.models]

    @property
    def densities(self) -> list[float]:
        """Density of each model."""
        return [self.density if m.density is None else m.density for m in self.models]

    @property
    def paths(self) -> list[str]:
        """The base model, where there is one, and the models."""
        return [*([self.base_model] if self.base_model else []), *(m.path for m in self.models)]


def read_recipe(path: Path | None, given: dict[str, Any], changes: Sequence[str]) -> MergeRecipe:
    """The recipe of a YAML file, or of plain data ``given``, with ``key=value`` changes on top.

    Raises ConfigError that lists every fault with key, file and line.
    """
    faults: list[Fault] = []
    root = wrap(given) if path is None else Files(faults).tree(path, str(path))
    root = apply_overrides(root, changes, to_dict(MergeRecipe()), faults)
    builder = Builder(faults, "a recipe")
    recipe = builder.section(MergeRecipe, root, ())
    if not faults:
        found = Collector()
        check_recipe(recipe, found)
        mark = None if path is None else Mark(str(path))
        faults.extend(Fault(f.path, f.message, mark) for f in found.found)
    raise_faults(faults)
    return recipe


def check_recipe(recipe: MergeRecipe, faults: Collector) -> None:
    """Rules between the keys of a recipe."""
    count = len(recipe.models)
    if recipe.method in BASED and recipe.base_model is None:
        faults.add("base_model", f"{recipe.method} needs it; give --base PATH")
    if recipe.method not in BASED and recipe.base_model is not None:
        faults.add("base_model", f"{recipe.method} has no base; leave it out, or name it a model")
    least = 1 if recipe.method in BASED and recipe.method != "model-stock" else 2
    if recipe.method in PAIRED and count != 1:
        faults.add("models", f"{recipe.method} merges one model with the base, not {count}")
    elif count < least:
        faults.add("models", f"{recipe.method} needs at least {least}, not {count}; name more")
    if recipe.align and recipe.method == "fisher":
        faults.add("align", "does not go together with fisher, whose information is not permuted")
    for i, model in enumerate(recipe.models):
        if not model.path.strip():
            faults.add(f"models.{i}.path", "is empty; name a checkpoint, a run or a folder")
    _check_read(recipe, faults)
    _check_weights(recipe, faults)


def _check_read(recipe: MergeRecipe, faults: Collector) -> None:
    """Keys that are set and that the method would not look at."""

    def check(section: MergeRecipe | ModelEntry, prefix: str) -> None:
        plain = type(section)()
        for name in (f.name for f in fields(section) if f.name in READ_BY):
            # A finished merge records every key, so the default is no sign of a wish.
            if getattr(section, name) != getattr(plain, name) and not reads(recipe, name):
                faults.add(prefix + name, ignored(recipe, name))

    check(recipe, "")
    for i, model in enumerate(recipe.models):
        check(model, f"models.{i}.")


def reads(recipe: MergeRecipe, name: str) -> bool:
    """Whether the method looks at the key of that last name."""
    return recipe.method in READ_BY.get(name, METHODS)


def ignored(recipe: MergeRecipe, name: str) -> str:
    """What to say of a key that the method does not look at."""
    return f"{recipe.method} does not read it; leave it out (it is for {', '.join(READ_BY[name])})"


def _check_weights(recipe: MergeRecipe, faults: Collector) -> None:
    """Weights that the method would divide by, and whose sum is or may become 0."""
    weights, method = recipe.weights, recipe.method
    for i, weight in enumerate(weights):
        if method == "fisher" and weight < 0:
            faults.add(f"models.{i}.weight", f"fisher needs at least 0, not {weight:g}; raise it")
        if method == "greedy-soup" and weight <= 0:
            message = f"greedy-soup needs more than 0, not {weight:g}; raise it or drop the model"
            faults.add(f"models.{i}.weight", message)
    divides = recipe.normalize is not False if method in ("linear", "soup") else method == "fisher"
    # With signs elected the divisor is another one in every place, and never 0.
    elects = method == "ties" or recipe.sign_election
    divides = divides or (method in _SUMS and recipe.normalize is True and not elects)
    size = math.fsum(map(abs, weights))
    if divides and weights and abs(math.fsum(weights)) <= _CANCELS * size:
        faults.add("models", "the weights sum to 0 and cannot be normalised; change one")
