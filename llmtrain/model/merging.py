"""Adapters merged into the weights of a live model, and taken out again.

A merged layer computes one product where there were three. What it computed before is kept, so that
``unmerge_adapters`` brings back every bit: W + s B A - s B A would not be W.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from llmtrain.errors import ConfigError
from llmtrain.linear import Change, Linear, LowRank, adapted_weight
from llmtrain.parallel import local_boxes, release_gathered, whole


def _adapted(model: nn.Module) -> Iterator[tuple[str, Linear, LowRank]]:
    for name, layer in model.named_modules():
        if isinstance(layer, Linear) and isinstance(layer.adapter, LowRank):
            yield name, layer, layer.adapter


def is_merged(model: nn.Module) -> bool:
    """Whether adapters of ``model`` are merged into its weights."""
    return any(side.merged for _, _, side in _adapted(model))


@torch.no_grad()
def merge_adapters(model: nn.Module, *, keep: bool = True, dequantise: bool = False) -> int:
    """Merge the adapters (LoRA, rsLoRA, DoRA) of ``model`` into its weights, in place; returns how
    many layers were merged, those that are merged already not among them.

    Each weight is computed whole, in float64, and rounded once, so every layout of tensor
    parallelism, FSDP2 and pipelines comes to the bits of one process, those that ``convert to-hf``
    writes. Collective over the ranks that share the model. keep: a copy of every merged weight
    stays for ``unmerge_adapters``; without it there is no way back. dequantise: packed frozen
    weights (``model.adapters.base``) become float32 ones. A model that is merged is not to be
    trained or saved. Raises ConfigError where the weights cannot hold what their adapters add:
    packed without ``dequantise``, sharded by FSDP2 and packed, masked, multiplied in FP8 or fake
    numbers, cut by ZeRO 3.
    """
    # Where blocks are gathered still, from a forward pass without backward, what is written here
    # would go with their gathered weights.
    release_gathered(model)
    found = [(n, layer, side) for n, layer, side in _adapted(model) if side.awake]
    for name, layer, side in found:
        if not side.merged:
            _check(name, layer, side, dequantise)
    count = 0
    for _, layer, side in found:
        if side.merged:
            continue
        packed = bool(layer.packed)
        if packed:
            layer.thaw(keep)
        boxes = local_boxes(layer.weight)
        # A packed base waits as it was beside the weight that takes its place.
        side.kept = [values.clone() for values, _ in boxes] if keep and not packed else None
        merged = adapted_weight(whole(layer.weight), _change(layer, side))
        for values, offset in boxes:
            own = tuple(slice(o, o + n) for o, n in zip(offset, values.shape, strict=True))
            values.copy_(merged[own])
        side.merged = True
        count += 1
    return count


@torch.no_grad()
def unmerge_adapters(model: nn.Module) -> int:
    """Put the weights back to the very bits that they had before ``merge_adapters``; returns of how
    many layers. Raises ConfigError where they were not kept."""
    release_gathered(model)
    merged = [(name, layer, side) for name, layer, side in _adapted(model) if side.merged]
    for name, layer, side in merged:
        if side.kept is None and not layer.thawed:
            raise ConfigError(
                f"{name} was merged with keep=False, so its own weight is gone; load the checkpoint"
            )
    for _, layer, side in merged:
        if layer.thawed:
            layer.refreeze()
        else:
            assert side.kept is not None
            for (values, _), before in zip(local_boxes(layer.weight), side.kept, strict=True):
                values.copy_(before)
        side.kept, side.merged = None, False
    return len(merged)


def _check(name: str, layer: Linear, side: LowRank, dequantise: bool) -> None:
    what = f"{name}: its adapter cannot be merged in place,"
    if layer.packed and not dequantise:
        raise ConfigError(
            f"{what} as its frozen weight is packed (model.adapters.base) and would have to be "
            "rounded again; merge with dequantise=True (llmtrain generate: --dequantise), which "
            "makes it float32"
        )
    if layer.packed and side.sharded:
        raise ConfigError(
            f"{what} as FSDP2 shards its packed weight; do it on one process or tensor ranks"
        )
    if layer.mask is not None:
        raise ConfigError(f"{what} as the weight is sparse and the sum would be masked")
    if layer.matmul.packs and not layer.packed:
        raise ConfigError(
            f"{what} as the weight is multiplied in {layer.matmul.name}, whose rounding would "
            "swallow what the adapter adds; use quantization.format: none"
        )
    if not layer.packed and hasattr(layer.weight, "ds_tensor"):
        raise ConfigError(f"{what} as ZeRO 3 has cut the weight; use convert to-hf on a checkpoint")


def _change(layer: Linear, side: LowRank) -> Change:
    """The adapter relative to the stored weight, which the layer's multiplier scales."""
    scale = layer.plan.scale
    length = None
    if side.magnitude is not None:
        length = whole(side.magnitude.weight).double() / scale
    scales = [factor / scale for factor in side.scales]
    a, b = whole(side.a.weight), whole(side.b.weight)
    return Change(a, b, scales, side.pattern, length)
