"""Sparse products on a GPU: which a case can have, why not, and what they take there.

======================  =====================================================================
mask                    product
======================  =====================================================================
2:4 (at most two of     torch's semi-structured ones: cuSPARSELt (Ampere and later), CUTLASS
four along inputs)      (compute capability 8.x). Backward too where two of four are kept along
                        the outputs: 2:4t, and SLoPe's second pruning
blocks of 64x64         the compiled kernels (llmtrain/ops/block_sparse.py), Ampere and later
all others              dense with zeros
======================  =====================================================================

All of bfloat16. The rest is dense with zeros, and the log says why.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from llmtrain.linear import BLOCKS, MaskedMatmul, matmul_for, sparse_matmul
from llmtrain.ops import cuda_fault
from llmtrain.ops.block_sparse import TILE, fits_blocks
from llmtrain.ops.semi import LIBRARIES, MULTIPLE, NAMES, first_sentence, library_fault
from llmtrain.sparsity.case import BOTH, Case, Choice
from llmtrain.sparsity.timing import Clock, random_mask, stopwatch

TOKENS, ROUNDS = 8192, 5
# Below this many elements a layer is dense unasked: launches are most of its time.
SMALLEST = 1 << 18


def why_never(case: Case) -> str:
    """Why no GPU has sparse products for a case; "" where some have."""
    if case.dtype != "bfloat16":
        return "sparse products on GPUs are of bfloat16"
    if case.semi:
        fits = case.rows % MULTIPLE == case.cols % MULTIPLE == 0
        return "" if fits else f"2:4 products want multiples of {MULTIPLE} outputs and inputs"
    if any(b % TILE for b in case.block):
        return "GPUs have sparse products for 2:4 and for blocks of 64x64 alone"
    return "" if fits_blocks((case.rows, case.cols), case.block) else "widths no multiples of 8"


def kinds_of(case: Case, device: torch.device) -> tuple[list[str], str]:
    """The sparse products that a case can have on a GPU, and why there are none."""
    reason = why_never(case)
    if reason:
        return [], reason
    if torch.cuda.get_device_capability(device) < (8, 0):
        return [], "the GPU is older than Ampere"
    if case.semi:
        faults = {name: library_fault(name, device) for name in LIBRARIES}
        found = [name for name, fault in faults.items() if fault is None]
        return found, "" if found else "; ".join(str(fault) for fault in faults.values())
    fault = cuda_fault()
    return ([BLOCKS], "") if fault is None else ([], f"the CUDA kernels are not in use: {fault}")


def promise(case: Case) -> str:
    """What a GPU that is not here will do for a case, for a plan."""
    reason = why_never(case)
    if reason:
        return f"dense products ({reason})"
    if case.semi:
        names = " or ".join(NAMES[name] for name in LIBRARIES)
        ways = "forward and backward" if case.semi == BOTH else "forward"
        return f"on a GPU, 2:4 products by {names} {ways} where they are the faster"
    return "on a GPU, block products where they are the faster"


def device_words(device: torch.device) -> tuple[str, ...]:
    """What measurements depend on: the GPU, its driver's and torch's versions."""
    versions = (torch.version.cuda, torch.backends.cusparselt.version())
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    return (name, *map(str, (*capability, *versions, TOKENS)))


def seconds(work: Callable[[], object], rounds: int = ROUNDS) -> float:
    """The least GPU time of a call, after two that do not count."""
    readings = []
    for i in range(rounds + 2):
        begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        begin.record()
        work()
        end.record()
        end.synchronize()
        if i > 1:
            readings.append(begin.elapsed_time(end) / 1000)
    return float(min(readings))


def measure(case: Case, device: torch.device, clock: Clock = seconds) -> Choice:
    """Time packing, forward and both gradients of one case, dense with a mask and by each sparse
    product that it can have; the faster of these counts."""
    kinds, reason = kinds_of(case, device)
    if reason:
        return Choice(0, 0, reason)
    try:
        return race(case, kinds, device, clock)
    except torch.OutOfMemoryError:
        return Choice(0, 0, "no memory was left to time sparse ones")
    finally:
        torch.cuda.empty_cache()


def race(
    case: Case,
    kinds: list[str],
    device: torch.device,
    clock: Clock,
) -> Choice:
    """``measure`` of the sparse products ``kinds``."""
    mask, inner = random_mask(case, device), matmul_for(torch.bfloat16)
    time_of = stopwatch(mask, torch.bfloat16, TOKENS, clock, packs=True)
    dense = time_of(MaskedMatmul(inner, mask))
    times, faults = {}, []
    for kind in kinds:
        try:
            times[kind] = time_of(sparse_matmul(inner, mask, kind=kind))
        except RuntimeError as error:  # a shape that a library does not take
            faults.append(f"{kind} refuses: {first_sentence(error)}")
    if not times:
        return Choice(0, 0, "; ".join(faults))
    best = min(times, key=lambda kind: times[kind])
    return Choice(dense, times[best], kind=best)
