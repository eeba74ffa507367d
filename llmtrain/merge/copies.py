"""Copies of a model's parameters in the parameters' own layout, and sums over that layout."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from llmtrain.checkpoint.store import explain
from llmtrain.parallel import Fragment

Weights = dict[str, Tensor]
_ALIGN = 64


def part(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, without gradient; writing to it writes to the tensor.

    The version counter is shared, so that cached operands of a parameter notice.
    """
    if isinstance(tensor, Fragment):
        return tensor.run
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor.detach()


def empty_copy(params: Mapping[str, Tensor], offload: bool, folder: Path | None = None) -> Weights:
    """Uninitialised tensors in the shape, dtype and layout of ``params``.

    offload: their memory is the host's (page-locked beside a GPU). Checkpoints read the layout
    from a DTensor and the values from its part, wherever that lies. folder: their memory is a
    file there instead, which has no name and goes with this process. Raises CheckpointError when
    the disk has no room.
    """
    own = {name: part(param) for name, param in params.items()}
    if folder is not None:
        new = _on_disk(own, folder)
    else:
        new = {name: _like(value, offload) for name, value in own.items()}
    return {name: _around(param, new[name]) for name, param in params.items()}


def _like(own: Tensor, offload: bool) -> Tensor:
    device = torch.device("cpu") if offload else own.device
    pinned = own.is_cuda and device.type == "cpu"
    return torch.empty(own.shape, dtype=own.dtype, device=device, pin_memory=pinned)


def _around(param: Tensor, values: Tensor) -> Tensor:
    """A tensor in the layout of ``param`` whose part is ``values``."""
    if isinstance(param, Fragment):
        return param.around(values)
    if isinstance(param, DTensor):
        # DTensor.from_local would move the part to the mesh's device, so the class is used.
        kind: Any = DTensor
        wrapped: Tensor = kind(values, param._spec, requires_grad=False)
        return wrapped
    return values


def _on_disk(parts: Weights, folder: Path) -> Weights:
    """Tensors over a new file that is mapped into memory and unlinked at once."""
    sizes = [-(-part.numel() * part.itemsize // _ALIGN) * _ALIGN for part in parts.values()]
    total = max(sum(sizes), _ALIGN)
    path = folder / f".copy-{secrets.token_hex(8)}"
    with explain(f"{folder} cannot hold {total / 1e6:,.1f} MB of averaged weights"):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with path.open("xb") as file:
                # Reserved now: writing to a mapped page that has no place ends the process.
                os.posix_fallocate(file.fileno(), 0, total)
            memory = torch.UntypedStorage.from_file(str(path), True, total)
        finally:
            path.unlink(missing_ok=True)
    found: Weights = {}
    at = 0
    for (name, own), size in zip(parts.items(), sizes, strict=True):
        flat = torch.empty(0, dtype=own.dtype)
        flat.set_(memory, at // own.itemsize, own.shape)  # type: ignore[call-overload]
        found[name] = flat
        at += size
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
