"""Copies of a model's parameters in the parameters' own layout, and sums over that layout."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from llmtrain.optim import counts_part
from llmtrain.parallel import Layout, release_gathered

Weights = dict[str, Tensor]


def part(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, without gradient; writing to it writes to the tensor.

    The version counter is shared, so that cached operands of a parameter notice.
    """
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor.detach()


def empty_copy(params: Mapping[str, Tensor], offload: bool) -> Weights:
    """Uninitialised tensors in the shape, dtype and layout of ``params``.

    offload: their memory is the host's (page-locked beside a GPU). Checkpoints read the layout
    from a DTensor and the values from its part, wherever that lies.
    """
    found: Weights = {}
    for name, param in params.items():
        own = part(param)
        device = torch.device("cpu") if offload else own.device
        pinned = own.is_cuda and device.type == "cpu"
        # DTensor.from_local would move the part to the mesh's device, so the class is used.
        new: Any = torch.empty(own.shape, dtype=own.dtype, device=device, pin_memory=pinned)
        if isinstance(param, DTensor):
            kind: Any = DTensor
            new = kind(new, param._spec, requires_grad=False)
        found[name] = new
    return found


@torch.no_grad()
def copy_into(target: Mapping[str, Tensor], source: Mapping[str, Tensor]) -> None:
    """Copy values part by part, across devices. Both have the same names and layout."""
    for name, value in source.items():
        part(target[name]).copy_(part(value), non_blocking=True)
    if any(part(value).is_cuda for value in (*source.values(), *target.values())):
        torch.cuda.synchronize()


@torch.no_grad()
def move_towards(target: Mapping[str, Tensor], goal: Mapping[str, Tensor], weight: float) -> None:
    """target <- (1 - weight) target + weight goal, in place; exactly ``goal`` at weight 1."""
    for name, value in goal.items():
        own = part(target[name])
        own.lerp_(part(value).to(own.device, non_blocking=True), weight)


@torch.no_grad()
def mean_into(target: Mapping[str, Tensor], sources: list[Weights]) -> None:
    """target <- mean of ``sources``, one parameter at a time, each mean rounded once."""
    for name, value in target.items():
        own = part(value)
        total = torch.zeros_like(own, dtype=torch.float64)
        for source in sources:
            total += part(source[name]).to(own.device, non_blocking=True)
        own.copy_(total.div_(len(sources)))


def parameters_changed(model: nn.Module) -> None:
    """Call after writing to parameters in place: gathered weights are no longer theirs."""
    release_gathered(model)


def sum_over_parts(values: Tensor, params: Iterable[Tensor], layout: Layout) -> Tensor:
    """Sums over all elements of each parameter from sums over each rank's part.

    values: float64 [number of parameters, ...] on the device. Every element counts once.
    """
    if layout.state is None:
        return values
    for i, param in enumerate(params):
        if not counts_part(param):
            values[i] = 0
    for dim in ("shard", "tensor"):
        dist.all_reduce(values, group=layout.state.get_group(dim))
    return values
