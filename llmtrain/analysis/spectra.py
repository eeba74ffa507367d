"""Singular values of the change of every matrix from one model to another.

LoRA Learns Less and Forgets Less (Biderman et al. 2024, 2405.09673, section 4.4): the rank that
explains 90% of the variance of the change of full finetuning is 10 to 100 times that of LoRA.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from llmtrain.analysis.weights import Matrices, check_same
from llmtrain.errors import ConfigError

SHARE = 0.9
# Round-off in the sums of squares; far below what one more singular value adds.
_SLACK = 1e-12


@dataclass(frozen=True)
class Spectrum:
    """The change of one matrix. values: its singular values, falling; before: the norm of the
    matrix itself."""

    name: str
    shape: tuple[int, int]
    values: tuple[float, ...]
    before: float

    @property
    def kind(self) -> str:
        """What the matrix is in its block: attention.q, mlp.down; or embedding, head."""
        words = self.name.split(".")
        return ".".join(words[2:]) if words[0] == "blocks" else self.name

    @property
    def block(self) -> int | None:
        """Number of its block."""
        words = self.name.split(".")
        return int(words[1]) if words[0] == "blocks" else None

    @property
    def norm(self) -> float:
        """Frobenius norm of the change."""
        return math.sqrt(math.fsum(s * s for s in self.values))

    @property
    def relative(self) -> float:
        """The norm of the change over that of the matrix before."""
        return self.norm / self.before if self.before else math.inf

    @property
    def rank90(self) -> int:
        """See ``explaining_rank``."""
        return explaining_rank(self.values)

    @property
    def effective(self) -> float:
        """See ``effective_rank``."""
        return effective_rank(self.values)

    def record(self) -> dict[str, Any]:
        """As JSON values; singular values to 7 digits."""
        return {
            "name": self.name,
            "shape": list(self.shape),
            "norm": self.norm,
            "relative_norm": self.relative,
            "rank90": self.rank90,
            "effective_rank": self.effective,
            "singular_values": [float(f"{s:.7g}") for s in self.values],
        }


def explaining_rank(values: Sequence[float], share: float = SHARE) -> int:
    """Least k with sum_{i<=k} s_i^2 >= share sum_i s_i^2 of falling singular values; 0 where all
    are 0 (2405.09673, section 4.4)."""
    total = math.fsum(s * s for s in values)
    if total == 0:
        return 0
    sofar = 0.0
    for k, s in enumerate(values, 1):
        sofar += s * s
        if sofar >= (share - _SLACK) * total:
            return k
    return len(values)


def effective_rank(values: Sequence[float]) -> float:
    """exp of the entropy of s_i / sum s (Roy and Vetterli 2007): k for k equal values."""
    total = math.fsum(values)
    if total == 0:
        return 0.0
    parts = [s / total for s in values if s > 0]
    return math.exp(-math.fsum(p * math.log(p) for p in parts))


def singular_values(matrix: Tensor) -> tuple[float, ...]:
    """Singular values of a matrix, falling, in float64."""
    found: list[float] = torch.linalg.svdvals(matrix.double()).tolist()
    return tuple(found)


def spectra(
    base: Matrices,
    model: Matrices,
    patterns: Sequence[str] = ("blocks.*",),
    device: torch.device | str = "cpu",
    say: Callable[[str], None] | None = None,
) -> list[Spectrum]:
    """The spectrum of the change from ``base`` to ``model`` of every matrix that a pattern names.

    One tensor of each model is in memory at a time. device: where singular values are computed.
    Raises CheckpointError for models of different shapes, ConfigError for a pattern that names
    no matrix.
    """
    check_same(base, model)
    layers = base.layers()
    names = [name for members in layers.values() for name in members]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ConfigError(
                f"{pattern!r} names no matrix; they are called {names[0]} to {names[-1]}"
            )
    found = []
    for layer, members in sorted(layers.items(), key=lambda item: _order(item[0])):
        wanted = [n for n in members if any(fnmatchcase(n, p) for p in patterns)]
        if not wanted:
            continue
        if say is not None:
            say(layer)
        old, new = base.read(layer), model.read(layer)
        for name in wanted:
            change = (new[name].double() - old[name].double()).to(device)
            before = float(old[name].double().norm())
            shape = (old[name].shape[0], old[name].shape[1])
            found.append(Spectrum(name, shape, singular_values(change), before))
    return found


def _order(layer: str) -> tuple[int, str]:
    words = layer.split(".")
    return (int(words[1]), layer) if words[0] == "blocks" else (-1, layer)


def summary_rows(found: Iterable[Spectrum]) -> list[tuple[str, ...]]:
    """Rows by kind of matrix, means over blocks, with a header."""
    kinds: dict[str, list[Spectrum]] = {}
    for one in found:
        kinds.setdefault(one.kind, []).append(one)
    rows: list[tuple[str, ...]] = [
        ("matrix", "shape", "relative norm", "rank for 90%", "of full rank", "effective rank")
    ]
    for kind, ones in kinds.items():
        shapes = dict.fromkeys("x".join(map(str, one.shape)) for one in ones)
        rows.append(
            (
                kind,
                ", ".join(shapes),
                f"{mean(one.relative for one in ones):.4f}",
                f"{mean(one.rank90 for one in ones):.1f}",
                f"{100 * mean(one.rank90 / min(one.shape) for one in ones):.1f}%",
                f"{mean(one.effective for one in ones):.1f}",
            )
        )
    return rows
