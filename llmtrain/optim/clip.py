"""Gradient norm and clipping over plain and sharded gradients."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer


def gradient_norm(params: Iterable[nn.Parameter]) -> Tensor:
    """Global L2 norm of all gradients: a 0-dim float32 tensor, equal on every rank.

    Squares are summed in float64: on a CPU torch's own norm sums in float32, loses 1e-3 on a
    large embedding and so depends on how the tensors are cut into shards.
    """
    grads = [p.grad for p in params if p.grad is not None]
    if not grads:
        return torch.zeros(())
    total: Tensor | None = None
    for grad in grads:
        norm = torch.linalg.vector_norm(_local(grad), dtype=torch.float64)
        total = norm.square() if total is None else total + norm.square()
    assert total is not None
    mesh = next((g.device_mesh for g in grads if isinstance(g, DTensor)), None)
    if mesh is not None:
        dist.all_reduce(total, group=mesh.get_group("shard"))
    return total.sqrt().float()


def _local(grad: Tensor) -> Tensor:
    return grad.to_local() if isinstance(grad, DTensor) else grad


def clip_gradients(params: Iterable[nn.Parameter], norm: Tensor, bound: float) -> None:
    """Scale gradients in place by min(1, bound / norm). norm: from ``gradient_norm``."""
    if float(norm) <= bound:
        return
    grads = [p.grad for p in params if p.grad is not None]
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
