"""Do the ranks that hold the same weights still hold the same bits?

Replicas (``parallel.replicate``) make the same update from the same summed gradient, and so do
tensor-parallel ranks with the parameters that each of them holds whole. A bit that flips in one
copy, in memory or in arithmetic, stays there and spoils the run slowly. ``verify_replicas`` hashes
every copy of weights and optimizer state, compares, and names rank and tensor.

The hash of 32-bit words x is sum over i of (2 i + 1) x_i modulo 2^64: odd factors are invertible,
so a change in any one word always changes it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from llmtrain.checkpoint.scattered import Scattered
from llmtrain.errors import GuardStop
from llmtrain.parallel import World


def verify_replicas(tensors: Mapping[str, Tensor], world: World, step: int) -> int:
    """Compare all copies; returns how many of this rank's tensors have another copy. Collective.

    tensors: of ``TrainModule.tensors``. Raises GuardStop on every rank, naming the ranks and the
    tensors that differ.
    """
    shared = _shared(tensors)
    found: list[str] = []
    for group, names in shared.values():
        hashes = torch.stack([words_hash(_local(tensors[name])) for name in names])
        found += _differences(group, names, hashes)
    if world.max([float(len(found))])[0] > 0:
        raise GuardStop(f"stopped after step {step}: {_sentence(found, world)}")
    return len({name for _, names in shared.values() for name in names})


def words_hash(tensor: Tensor) -> Tensor:
    """Hash of a tensor's bits: a 0-dim int64 on its device."""
    flat = tensor.detach().contiguous().view(-1)
    words = flat.view(torch.int32 if flat.element_size() % 4 == 0 else torch.uint8).long()
    factors = torch.arange(len(words), device=words.device).mul_(2).add_(1)
    return (words * factors).sum()


def _local(tensor: Tensor) -> Tensor:
    if isinstance(tensor, Scattered):
        return tensor.kept
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _shared(tensors: Mapping[str, Tensor]) -> dict[str, tuple[dist.ProcessGroup, list[str]]]:
    """Groups of ranks that hold the same part, and the names of what they hold, by group."""
    found: dict[str, tuple[dist.ProcessGroup, list[str]]] = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, Scattered) and dist.is_initialized():
            # Replicas alone have these, and all ranks are replicas then.
            group = dist.group.WORLD
            assert group is not None
            found.setdefault(group.group_name, (group, []))[1].append(name)
        if not isinstance(tensor, DTensor):
            continue
        mesh = tensor.device_mesh
        for dim, placement in enumerate(tensor.placements):
            if isinstance(placement, Replicate) and mesh.size(dim) > 1:
                group = mesh.get_group(dim)
                found.setdefault(group.group_name, (group, []))[1].append(name)
    return found


def _differences(group: dist.ProcessGroup, names: list[str], hashes: Tensor) -> list[str]:
    """Tensors whose copies in ``group`` differ, each with the ranks that are in the minority."""
    lowest, highest = hashes.clone(), hashes.clone()
    dist.all_reduce(lowest, op=dist.ReduceOp.MIN, group=group)
    dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
    differ = (lowest != highest).nonzero().flatten().tolist()
    if not differ:
        return []
    size = dist.get_world_size(group)
    copies = [torch.empty_like(hashes) for _ in range(size)]
    dist.all_gather(copies, hashes, group=group)
    found = []
    for i in differ:
        values = [int(copy[i]) for copy in copies]
        (common, count), *_ = Counter(values).most_common(1)
        odd = [r for r, value in enumerate(values) if value != common]
        if 2 * count <= size:
            odd = list(range(size))  # no majority: nobody is known to be right
        ranks = [dist.get_global_rank(group, r) for r in odd]
        found.append(f"{names[i]} on {_ranks(ranks)}, one of {size} copies")
    return found


def _ranks(ranks: list[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + " or ".join(map(str, ranks))


def _sentence(found: list[str], world: World) -> str:
    """What differs, from all groups; the same on all ranks."""
    every: list[Any] = [found]
    if world.size > 1:
        every = [None] * world.size
        dist.all_gather_object(every, found, group=world.cpu_group)
    texts = sorted({text for part in every for text in part})
    more = f" and {len(texts) - 4} more" if len(texts) > 4 else ""
    return (
        f"copies of the same weights differ: {'; '.join(texts[:4])}{more}. Memory or arithmetic of "
        "that rank is faulty: leave its node out, and resume from a checkpoint before the last "
        "step at which the copies were equal"
    )
