"""Sparse or dense products: each layer shape is timed once on a device, and the faster kept.

SparseProp (Nikdan et al. 2023, 2302.04852) swaps a layer only where sparse products were measured
to be faster; so here. Forward and both gradients of random masks are timed and remembered in the
user's cache, by processor (or GPU), kernels, threads and torch version. Rank 0 decides for all.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import astuple
from pathlib import Path

import torch
import torch.distributed as dist

from llmtrain.linear import MaskedMatmul, SparseMatmul, matmul_for
from llmtrain.machine import processor_name
from llmtrain.ops import native_loaded
from llmtrain.ops.cuda import SOURCES as CUDA_SOURCES
from llmtrain.ops.native import kernels, sources_stamp
from llmtrain.sparsity import on_gpu
from llmtrain.sparsity.case import Case, Choice
from llmtrain.sparsity.timing import random_mask, stopwatch

TOKENS, ROUNDS = 1024, 3
# Below this many elements a layer is dense unasked: it costs nothing either way.
SMALLEST_SPARSE = 1 << 16


def cache_file(gpu: torch.device | None = None) -> Path:
    """Where this device's measurements lie: $LLMTRAIN_CACHE, or llmtrain in $XDG_CACHE_HOME."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    folder = Path(os.environ.get("LLMTRAIN_CACHE") or Path(base) / "llmtrain")
    device: tuple[object, ...] = (torch.__version__,)
    if gpu is None:
        device = (processor_name(), kernels().kernel_set(), *device, sources_stamp())
        device = (*device, torch.get_num_threads(), TOKENS)
    else:
        device = (*on_gpu.device_words(gpu), *device, sources_stamp(CUDA_SOURCES))
    key = hashlib.sha256(repr(device).encode()).hexdigest()
    return folder / f"sparse-{key[:16]}.json"


def _read(path: Path) -> dict[str, Choice]:
    """Earlier measurements; none where the file is absent or not one of ours."""
    try:
        stored = json.loads(path.read_text("utf-8"))
        found = {
            name: Choice(float(d), float(s), kind="".join(kind))
            for name, (d, s, *kind) in stored.items()
        }
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
    return {name: c for name, c in found.items() if c.dense > 0 and c.sparse > 0}


def _write(path: Path, found: dict[str, Choice]) -> None:
    """One rename publishes the file; a cache that cannot be written is no fault."""
    stored = {
        name: (choice.dense, choice.sparse, *([choice.kind] if choice.kind else []))
        for name, choice in sorted(found.items())
    }
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
    dtype = getattr(torch, case.dtype)
    mask, inner = random_mask(case, torch.device("cpu")), matmul_for(dtype)
    time_of = stopwatch(mask, dtype, TOKENS, _seconds, packs=False)
    return Choice(time_of(MaskedMatmul(inner, mask)), time_of(SparseMatmul(inner, mask)))


def pick_products(
    cases: Iterable[Case],
    group: dist.ProcessGroup | None = None,
    gpu: torch.device | None = None,
) -> dict[Case, Choice]:
    """What is faster for each of ``cases``, on a CPU or on ``gpu``. Collective over ``group``,
    whose first rank measures what is not in its cache, for the cases of all ranks."""
    wanted = set(cases)
    ranks = 1 if group is None else dist.get_world_size(group)
    if ranks > 1:
        asked: list[set[Case]] = [set() for _ in range(ranks)]
        dist.all_gather_object(asked, wanted, group=group)
        wanted = set().union(*asked)
    answer = [_pick(wanted, gpu) if ranks == 1 or dist.get_rank(group) == 0 else {}]
    if ranks > 1:
        dist.broadcast_object_list(answer, group=group, group_src=0)
    return answer[0]


def _pick(cases: set[Case], gpu: torch.device | None) -> dict[Case, Choice]:
    if gpu is None and not native_loaded():
        return dict.fromkeys(cases, Choice(0, 0, "the compiled kernels are not in use"))
    path = cache_file(gpu)
    known, fresh, found = _read(path), False, {}
    for case in sorted(cases, key=astuple):
        if case.rows * case.cols < (SMALLEST_SPARSE if gpu is None else on_gpu.SMALLEST):
            found[case] = Choice(0, 0, "too small to matter")
            continue
        if gpu is not None:
            # What was the fastest may be gone, such as kernels that are not built any more.
            kinds, reason = on_gpu.kinds_of(case, gpu)
            if reason:
                found[case] = Choice(0, 0, reason)
                continue
            if str(case) in known and known[str(case)].kind not in kinds:
                del known[str(case)]
        if str(case) not in known:
            measured = measure(case) if gpu is None else on_gpu.measure(case, gpu)
            if measured.reason:
                found[case] = measured
                continue
            known[str(case)], fresh = measured, True
        found[case] = known[str(case)]
    if fresh:
        _write(path, known)
    return found
