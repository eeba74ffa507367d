"""Sparse or dense products: each layer shape is timed once on a device, and the faster kept.

SparseProp (Nikdan et al. 2023, 2302.04852) swaps a layer only where sparse products were measured
to be faster; so here. Forward and both gradients of random masks are timed by processor time and
remembered in the user's cache, by processor, kernels, threads and torch version. Rank 0 decides
for all.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import astuple, dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from llmtrain.linear import Mask, MaskedMatmul, Packed, SparseMatmul, matmul_for
from llmtrain.machine import processor_name
from llmtrain.ops import native_loaded
from llmtrain.ops.native import kernels, sources_stamp
from llmtrain.sparsity.select import Sparse

TOKENS, ROUNDS = 1024, 3
# Below this many elements a layer is dense unasked: it costs nothing either way.
SMALLEST_SPARSE = 1 << 16


@dataclass(frozen=True)
class Case:
    """What a choice depends on: a weight [rows, cols], its blocks, density in percent, dtype."""

    rows: int
    cols: int
    block: tuple[int, int]
    percent: int
    dtype: str

    def __str__(self) -> str:
        kind = "unstructured" if self.block == (1, 1) else f"{self.block[0]}x{self.block[1]}"
        return f"{self.rows}x{self.cols} {kind}, {self.percent}% kept, {self.dtype}"


@dataclass(frozen=True)
class Choice:
    """Seconds of forward and backward, dense and sparse; why there are none, if so."""

    dense: float
    sparse: float
    reason: str = ""

    @property
    def faster(self) -> bool:
        """Whether sparse products are used."""
        return not self.reason and self.sparse < self.dense

    def __str__(self) -> str:
        if self.reason:
            return f"dense products ({self.reason})"
        ratio = self.dense / self.sparse
        used = "sparse" if self.faster else "dense"
        return f"{used} products (sparse are {ratio:.2f} times as fast)"


def case_of(
    shape: tuple[int, int], block: tuple[int, int], density: float, dtype: torch.dtype
) -> Case:
    """The case of a weight's part; densities are rounded to twentieths."""
    percent = 5 * max(1, round(density * 20))
    return Case(shape[0], shape[1], block, percent, str(dtype).removeprefix("torch."))


def cases_of(sparse: Mapping[str, Sparse], ranks: int, dtype: torch.dtype) -> dict[str, Case]:
    """The cases of whole layers, cut into ``ranks`` tensor-parallel parts, by name."""
    found = {}
    for name, layer in sparse.items():
        rows, cols = layer.shape
        column = name.endswith(("attention.qkv", "mlp.up"))
        shape = (rows // ranks, cols) if column else (rows, cols // ranks)
        found[name] = case_of(shape, layer.granularity.block, layer.density, dtype)
    return found


def choice_lines(cases: Mapping[str, Case], choices: Mapping[Case, Choice]) -> list[str]:
    """One line a case: how many layers, and which products they get by how much."""
    lines = []
    for case in dict.fromkeys(cases.values()):
        names = [name for name, own in cases.items() if own == case]
        more = "" if len(names) == 1 else f" and {len(names) - 1} more"
        lines.append(f"{names[0]}{more} ({case}): {choices[case]}")
    return lines


def cache_file() -> Path:
    """Where this device's measurements lie: $LLMTRAIN_CACHE, or llmtrain in $XDG_CACHE_HOME."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    folder = Path(os.environ.get("LLMTRAIN_CACHE") or Path(base) / "llmtrain")
    device = (processor_name(), kernels().kernel_set(), torch.__version__, sources_stamp())
    key = hashlib.sha256(repr((*device, torch.get_num_threads(), TOKENS)).encode()).hexdigest()
    return folder / f"sparse-{key[:16]}.json"


def _read(path: Path) -> dict[str, Choice]:
    """Earlier measurements; none where the file is absent or not one of ours."""
    try:
        stored = json.loads(path.read_text("utf-8"))
        found = {name: Choice(float(d), float(s)) for name, (d, s) in stored.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
    return {name: c for name, c in found.items() if c.dense > 0 and c.sparse > 0}


def _write(path: Path, found: dict[str, Choice]) -> None:
    """One rename publishes the file; a cache that cannot be written is no fault."""
    stored = {name: astuple(choice)[:2] for name, choice in sorted(found.items())}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump(stored, file, indent=1)
        os.replace(file.name, path)
    except OSError:
        return


def _seconds(work: Callable[[], object]) -> float:
    work()
    readings = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        work()
        readings.append(time.perf_counter() - begin)
    return min(readings)


def measure(case: Case) -> Choice:
    """Time forward and both gradients of one case, dense with a mask and sparse."""
    gen = torch.Generator().manual_seed(0)
    grid = (-(-case.rows // case.block[0]), -(-case.cols // case.block[1]))
    mask = Mask(
        torch.rand(grid, generator=gen) < case.percent / 100, case.block, (case.rows, case.cols)
    )
    dtype = getattr(torch, case.dtype)
    weight = torch.randn(case.rows, case.cols, generator=gen)
    x, grad = (
        Packed(torch.randn(TOKENS, n, generator=gen).to(dtype)) for n in (case.cols, case.rows)
    )
    inner, found = matmul_for(dtype), []
    for matmul in (MaskedMatmul(inner, mask), SparseMatmul(inner, mask)):
        operand = matmul.operand(weight)

        def work(m: MaskedMatmul = matmul, w: Packed = operand) -> None:
            m.fprop(x, w, None)
            m.dgrad(grad, w)
            m.wgrad(grad, x)

        found.append(_seconds(work))
    return Choice(found[0], found[1])


def pick_products(
    cases: Iterable[Case], group: dist.ProcessGroup | None = None
) -> dict[Case, Choice]:
    """What is faster for each of ``cases``. Collective over ``group``, whose first rank measures
    what is not in its cache, for the cases of all ranks."""
    wanted = set(cases)
    ranks = 1 if group is None else dist.get_world_size(group)
    if ranks > 1:
        asked: list[set[Case]] = [set() for _ in range(ranks)]
        dist.all_gather_object(asked, wanted, group=group)
        wanted = set().union(*asked)
    answer = [_pick(wanted) if ranks == 1 or dist.get_rank(group) == 0 else {}]
    if ranks > 1:
        dist.broadcast_object_list(answer, group=group, group_src=0)
    return answer[0]


def _pick(cases: set[Case]) -> dict[Case, Choice]:
    if not native_loaded():
        return dict.fromkeys(cases, Choice(0, 0, "the compiled kernels are not in use"))
    path = cache_file()
    known, fresh, found = _read(path), False, {}
    for case in sorted(cases, key=astuple):
        if case.rows * case.cols < SMALLEST_SPARSE:
            found[case] = Choice(0, 0, "too small to matter")
            continue
        if str(case) not in known:
            known[str(case)], fresh = measure(case), True
        found[case] = known[str(case)]
    if fresh:
        _write(path, known)
    return found
