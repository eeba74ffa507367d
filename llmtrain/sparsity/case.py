"""What a choice between sparse and dense products depends on, and what it came to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llmtrain.model import cut_dim
from llmtrain.ops.semi import NAMES, fits_semi
from llmtrain.sparsity.granularity import Granularity
from llmtrain.sparsity.select import Sparse

FORWARD, BOTH = "2:4", "2:4 both ways"


@dataclass(frozen=True)
class Case:
    """A weight [rows, cols], its blocks, density in percent, dtype.

    semi: on a GPU, whether at most two of four are kept along the inputs (``FORWARD``), or along
    the outputs as well in what backward reads (``BOTH``). pattern: N:M of other single weights.
    """

    rows: int
    cols: int
    block: tuple[int, int]
    percent: int
    dtype: str
    semi: str = ""
    pattern: str = ""

    def __str__(self) -> str:
        kind = "unstructured" if self.block == (1, 1) else f"{self.block[0]}x{self.block[1]}"
        kind = self.semi or self.pattern or kind
        return f"{self.rows}x{self.cols} {kind}, {self.percent}% kept, {self.dtype}"

    def with_semi(self, semi: str) -> Case:
        """The same with ``semi``, which then says all that matters of N:M."""
        return replace(self, semi=semi, pattern="" if semi else self.pattern)


@dataclass(frozen=True)
class Choice:
    """Seconds of forward and backward, dense and sparse; why there are none, if so. kind: which
    sparse product that was, where a device has several."""

    dense: float
    sparse: float
    reason: str = ""
    kind: str = ""

    @property
    def faster(self) -> bool:
        """Whether sparse products are used."""
        return not self.reason and self.sparse < self.dense

    def __str__(self) -> str:
        if self.reason:
            return f"dense products ({self.reason})"
        ratio = self.dense / self.sparse
        used = "sparse" if self.faster else "dense"
        by = f" by {NAMES.get(self.kind, self.kind)}" if self.kind else ""
        return f"{used} products (sparse{by} are {ratio:.2f} times as fast)"


def case_of(
    shape: tuple[int, int], granularity: Granularity, density: float, dtype: torch.dtype
) -> Case:
    """The case of a weight's part; densities are rounded to twentieths."""
    percent = 5 * max(1, round(density * 20))
    kind = str(dtype).removeprefix("torch.")
    pattern = granularity.text if granularity.m else ""
    return Case(*shape, granularity.block, percent, kind, pattern=pattern)


def semi_of_mask(kept: Tensor, back: Tensor | None) -> str:
    """``Case.semi`` of a mask of single weights and, if there is one, the one for backward."""
    if not fits_semi(kept):
        return ""
    return BOTH if fits_semi(kept if back is None else back, True) else FORWARD


def semi_of(granularity: Granularity, double: bool) -> str:
    """The same of any mask of a granularity. double: pruned once more for backward."""
    n, m = granularity.n, granularity.m
    if not ((m == 2 and n == 1) or (m > 0 and m % 4 == 0 and n <= 2)):
        return ""
    return BOTH if granularity.both or double else FORWARD


def cases_of(
    sparse: Mapping[str, Sparse],
    ranks: int,
    dtype: torch.dtype,
    *,
    gpu: bool = False,
    double: bool = False,
) -> dict[str, Case]:
    """The cases of whole layers, cut into ``ranks`` tensor-parallel parts, by name.

    gpu: where they run; double: with a second mask for backward.
    """
    found = {}
    for name, layer in sparse.items():
        rows, cols = layer.shape
        shapes = {0: (rows // ranks, cols), 1: (rows, cols // ranks), None: (rows, cols)}
        case = case_of(shapes[cut_dim(name)], layer.granularity, layer.density, dtype)
        semi = semi_of(layer.granularity, double) if gpu else ""
        found[name] = case.with_semi(semi)
    return found


def choice_lines(cases: Mapping[str, Case], choices: Mapping[Case, object]) -> list[str]:
    """One line a case: how many layers, and which products they get by how much."""
    lines = []
    for case in dict.fromkeys(cases.values()):
        names = [name for name, own in cases.items() if own == case]
        more = "" if len(names) == 1 else f" and {len(names) - 1} more"
        lines.append(f"{names[0]}{more} ({case}): {choices[case]}")
    return lines
