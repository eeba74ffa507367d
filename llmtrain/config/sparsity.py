"""The section that says which weights of the hidden linear layers exist."""

from __future__ import annotations

from dataclasses import dataclass

from llmtrain.config.duration import Duration
from llmtrain.config.fields import dur, key

# Methods whose mask changes; of them those that begin dense, and those whose weights live on
# outside the mask until it is settled.
CHANGING = ("set", "rigl", "gradual", "movement", "srste")
FALLING = ("gradual", "movement")
LIVE = ("movement", "srste")


@dataclass(frozen=True)
class SparsityRule:
    """Another density or granularity for some layers."""

    layers: list[str] = key(list, "patterns of layer names, such as blocks.0.* or *.mlp.down")
    density: float | None = key(
        None, "their share of kept weights; 1: dense; null: the section's", ge=0, le=1
    )
    granularity: str | None = key(None, "their granularity; null: the section's")


@dataclass(frozen=True)
class SparsityConfig:
    """Sparse hidden linear layers; embedding, norms, biases and head are always dense."""

    method: str = key(
        "static",
        "static: the mask stays (SPDF); set, rigl: weights are dropped and grown in turns; "
        "gradual: pruned step by step; slope: N:M, pruned once more for backward, and "
        "adapters at the end; lost: columns beside a low-rank part, both of the initial weights; "
        "movement: scores learn what goes; srste: N:M of the present magnitudes",
        choices=("static", "set", "rigl", "gradual", "slope", "lost", "movement", "srste"),
    )
    granularity: str = key(
        "unstructured",
        "what is kept or pruned together: unstructured, blocks such as 1x2, 4x4, 64x64 "
        "(outputs x inputs), N of M inputs such as 2:4, or of inputs and of outputs: 2:4t",
    )
    density: float | None = key(
        None, "share of kept weights, of every layer; null: that of N:M", ge=0, le=1
    )
    rules: list[SparsityRule] = key(list, "other densities by layer; the last that matches counts")
    choose: str = key(
        "random",
        "the first mask: random, or the largest magnitudes of the weights the run begins with",
        choices=("random", "magnitude"),
    )
    masks: str | None = key(
        None, "the first mask: of a checkpoint, or a file of `llmtrain sparsity lottery`"
    )
    seed: int | None = key(None, "of random masks; null: the run's", ge=0, lt=2**63)
    until: Duration | None = key(
        None, "the mask is dropped here, and zeros begin to learn; null: never", gt=0
    )
    every: Duration = key(
        lambda: dur("0.01dur"),
        "set, rigl, gradual, movement: time between changes of the mask",
        gt=0,
    )
    start: Duration = key(lambda: dur("0dur"), "gradual, movement: where pruning begins")
    end: Duration = key(
        lambda: dur("0.75dur"),
        "set, rigl, gradual, movement: where the mask changes for the last time",
        gt=0,
    )
    fraction: float = key(
        0.3, "set, rigl: share of the kept that is replaced, at first (cosine to 0)", gt=0, lt=1
    )
    adapters_at: Duration = key(
        lambda: dur("0.99dur"), "slope: where model.adapters begin to take part", gt=0
    )
    gamma: float = key(
        0.5, "lost: factor of the low-rank part; 1 - gamma: of the columns", gt=0, lt=1
    )
    score_rate: float = key(1.0, "movement: learning rate of the scores", gt=0)
    threshold: float | None = key(
        None,
        "movement: keep where the sigmoid of a score is above, instead of the largest; density is "
        "then what is expected",
        gt=0,
        lt=1,
    )
    score_decay: float = key(
        0.0, "movement: penalty on the mean sigmoid of a layer's scores, for threshold", ge=0
    )
    decay_pruned: float = key(
        2e-4, "srste: pull to zero of pruned weights, a part of their gradient", ge=0
    )
    products: str = key(
        "auto",
        "auto: each shape is timed once on a device, sparse against dense, and the faster kept; "
        "sparse, dense: always. GPUs have sparse ones for 2:4 and blocks of 64x64, in bf16",
        choices=("auto", "sparse", "dense"),
    )
    storage: str = key(
        "auto",
        "packed: kept weights alone, with gradients and moments for them only; dense: with zeros; "
        "auto: packed on a CPU where masks stay and ranks do not share matrices",
        choices=("auto", "packed", "dense"),
    )


@dataclass(frozen=True)
class LotteryConfig:
    """Iterative magnitude pruning with rewinding, for ``llmtrain sparsity lottery``."""

    levels: int = key(8, "prunings, one after the other; level k keeps (1 - prune)^k", ge=1, le=99)
    prune: float = key(0.2, "share of the kept weights that goes at each level", gt=0, lt=1)
    rewind: Duration = key(
        lambda: dur("0.05dur"), "where each level begins again, with the weights of then", gt=0
    )
    points: int = key(
        5,
        "places on the line between two levels where the loss is measured, at least 3; 0: none",
        ge=0,
        le=99,
    )
