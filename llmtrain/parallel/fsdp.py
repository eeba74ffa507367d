"""Sharded data parallelism through FSDP2 (``fully_shard``).

Gradients are *summed* over ranks, not averaged: the loss is already divided by the global
weight (idea 5 of the design), so the layout never changes the gradient. With one shard and
several replicas the same code is plain data parallelism.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from llmtrain.config.parallel import ParallelConfig


def apply_fsdp(
    model: nn.Module,
    blocks: Iterable[nn.Module],
    mesh: DeviceMesh,
    cfg: ParallelConfig,
    dtypes: tuple[torch.dtype, torch.dtype],
    apart: Iterable[nn.Parameter] = (),
) -> None:
    """Shard ``model`` in place, one communication group per block and one for the rest.

    model: on the meta device or with real weights. dtypes: (compute, gradient reduction).
    Afterwards parameters are DTensors over ``mesh``: (Replicate, Shard(0)). apart: those that stay
    as they are, whole on every rank.
    """
    compute, reduce = dtypes
    policy = MixedPrecisionPolicy(
        param_dtype=None if compute == torch.float32 else compute,
        reduce_dtype=reduce,
        cast_forward_inputs=False,
    )
    sharded, ignored = [], set(apart)
    for block in blocks:
        fully_shard(
            block,
            mesh=mesh,
            mp_policy=policy,
            reshard_after_forward=cfg.reshard_after_forward,
            ignored_params=ignored,
        )
        assert isinstance(block, FSDPModule)
        sharded.append(block)
    _set_prefetch(sharded, cfg.prefetch)
    fully_shard(
        model, mesh=mesh, mp_policy=policy, reshard_after_forward=False, ignored_params=ignored
    )
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)


def _set_prefetch(blocks: Sequence[FSDPModule], ahead: int) -> None:
    """Gather the weights of the next ``ahead`` blocks in either direction while one computes.

    1 is what FSDP2 does by itself in backward; in forward it relies on the order of launches,
    which a slow CPU thread breaks, so the order is said explicitly.
    """
    for i, block in enumerate(blocks):
        block.set_modules_to_forward_prefetch(list(blocks[i + 1 : i + 1 + ahead]))
        block.set_modules_to_backward_prefetch(list(blocks[max(i - ahead, 0) : i][::-1]))


def release_gathered(model: nn.Module) -> None:
    """Free gathered weights after a forward without backward; a no-op without FSDP2.

    The root keeps its weights gathered from forward to backward, and so do the blocks without
    ``reshard_after_forward``. After an evaluation or a generation there is no backward, and the
    next forward would use them as they are even when the parameters have changed in between.
    """
    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def gather_whole(model: nn.Module) -> None:
    """Gather the weights of every part that are not gathered yet; a no-op without FSDP2."""
    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.unshard()


def set_gradient_sync(model: nn.Module, last: bool) -> None:
    """Reduce gradients only in the ``last`` micro-batch of a step; a no-op without FSDP2."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
        model.set_is_last_backward(last)
