"""Gradient norm and clipping over plain and sharded gradients."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.optim import AdamW, Optimizer

from llmtrain.parallel import Layout


def gradient_norm(params: Iterable[nn.Parameter], layout: Layout | None = None) -> Tensor:
    """Global L2 norm of all gradients: a 0-dim float32 tensor, equal on every rank.

    layout: of several processes. Each element counts once: a part that several ranks hold (a
    replicated parameter under tensor parallelism) is counted by the first of them. Squares are
    summed in float64: on a CPU torch's own norm sums in float32, loses 1e-3 on a large embedding
    and so depends on how the tensors are cut into shards.
    """
    grads = [p.grad for p in params if p.grad is not None]
    device = grads[0].device if grads else torch.device("cpu")
    total = torch.zeros((), dtype=torch.float64, device=device)
    for grad in grads:
        if counts_part(grad):
            total += torch.linalg.vector_norm(local_part(grad), dtype=torch.float64).square()
    if layout is not None and layout.state is not None:
        for dim in ("shard", "tensor", "pipeline"):
            dist.all_reduce(total, group=layout.state.get_group(dim))
    return total.sqrt().float()


def counts_part(tensor: Tensor) -> bool:
    """Whether this rank counts its part in a sum over the elements of all ranks.

    True for the first of the ranks that hold the same part; replicas are no part of such a sum.
    """
    if not isinstance(tensor, DTensor):
        return True
    mesh = tensor.device_mesh
    names, place = mesh.mesh_dim_names, mesh.get_coordinate()
    assert names is not None and place is not None
    return all(
        index == 0 or name == "replicate" or not isinstance(placement, Replicate)
        for name, index, placement in zip(names, place, tensor.placements, strict=True)
    )


def sum_over_parts(values: Tensor, params: Iterable[Tensor], layout: Layout) -> Tensor:
    """Sums over all elements of each parameter from sums over each rank's part.

    values: float64 [number of parameters, ...] on the device. Every element counts once. Under
    pipeline parallelism the parameters are those of the rank's own stages.
    """
    if layout.state is None:
        return values
    for i, param in enumerate(params):
        if not counts_part(param):
            values[i] = 0
    for dim in ("shard", "tensor"):
        dist.all_reduce(values, group=layout.state.get_group(dim))
    return values


@torch.no_grad()
def local_part(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor; writing to it writes to the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def clip_gradients(params: Iterable[nn.Parameter], norm: Tensor, bound: float) -> None:
    """Scale gradients in place by min(1, bound / norm). norm: from ``gradient_norm``."""
    if float(norm) <= bound:
        return
    grads = [local_part(p.grad) for p in params if p.grad is not None]
    torch._foreach_mul_(grads, bound / float(norm))


def clipped_step(
    optimizer: Optimizer, params: Iterable[nn.Parameter], norm: Tensor, bound: float | None
) -> None:
    """One update with the gradients scaled by min(1, bound / norm). norm: ``gradient_norm``.

    The fused AdamW kernel scales while it reads, which saves a pass over all gradients; it knows
    plain tensors only, so sharded gradients and other optimizers are scaled first.
    """
    listed = list(params)
    if bound is None or float(norm) <= bound:
        optimizer.step()
        return
    if not isinstance(optimizer, AdamW) or any(isinstance(p, DTensor) for p in listed):
        clip_gradients(listed, norm, bound)
        optimizer.step()
        return
    fused: Any = optimizer
    fused.grad_scale, fused.found_inf = norm / bound, torch.zeros_like(norm)
    try:
        optimizer.step()
    finally:
        fused.grad_scale = fused.found_inf = None
