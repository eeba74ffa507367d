"""Masks in files: safetensors files of packed bits, by layer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from llmtrain.errors import ConfigError
from llmtrain.linear import Mask
from llmtrain.sparsity.bits import pack_bits, unpack_bits
from llmtrain.sparsity.select import Sparse

FORMAT = "llmtrain-masks-1"


def write_masks(path: Path, masks: Mapping[str, Mask]) -> None:
    """Write masks of whole matrices by name: bits along the inputs, first in the lowest bit.

    The metadata ``masks`` is JSON: name -> {"shape": [outputs, inputs], "block": [r, c]}.
    """
    facts = {n: {"shape": list(m.shape), "block": list(m.block)} for n, m in masks.items()}
    bits = {name: pack_bits(mask.kept.cpu()) for name, mask in masks.items()}
    part = path.with_name(f"{path.name}.part")  # a name that stands for a whole file
    save_file(bits, part, metadata={"format": FORMAT, "masks": json.dumps(facts)})
    part.replace(path)


def load_masks(path: Path) -> dict[str, Mask]:
    """What ``write_masks`` wrote. Raises ConfigError naming a file that is no such."""
    try:
        with safe_open(path, "pt") as file:
            meta = file.metadata() or {}
            if meta.get("format") != FORMAT:
                raise ConfigError(
                    f"sparsity.masks: {path} is no file of masks; `llmtrain sparsity lottery` "
                    "writes them, or name a checkpoint of a sparse run"
                )
            facts = json.loads(meta["masks"])
            return {name: _unpacked(file.get_tensor(name), **facts[name]) for name in facts}
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"sparsity.masks: {path} cannot be read ({error})") from error
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"sparsity.masks: {path} is damaged ({type(error).__name__}: {error}); make it anew"
        ) from error


def _unpacked(bits: Tensor, shape: list[int], block: list[int]) -> Mask:
    """The mask of a matrix ``shape``. Raises ValueError or TypeError where bits are not of it."""
    (rows, columns), (high, wide) = shape, block
    if min(rows, columns, high, wide) < 1:
        raise ValueError(f"a matrix {shape} in blocks {block}")
    down, across = -(-rows // high), -(-columns // wide)
    if bits.dtype != torch.uint8 or tuple(bits.shape) != (down, -(-across // 8)):
        raise ValueError(f"bits {list(bits.shape)} of a matrix {shape} in blocks {block}")
    return Mask(unpack_bits(bits, across), (high, wide), (rows, columns))


def fit_masks(
    found: Mapping[str, Mask], sparse: Mapping[str, Sparse], path: Path
) -> dict[str, Tensor]:
    """The masks of the layers ``sparse``: bool, one value per block of their granularity.

    path: where they were ``found``. Raises ConfigError for a missing layer, another shape, or a
    mask that is no such pattern.
    """
    kept = {}
    for name, layer in sparse.items():
        if name not in found:
            if not any(other in sparse for other in found):
                raise ConfigError(
                    f"sparsity.masks: {path} has masks of {next(iter(found), 'nothing')} ..., and "
                    f"this model's layers are {name} ...; name a checkpoint of ours or a file of "
                    "`llmtrain sparsity lottery` (masks beside exported weights are for others)"
                )
            raise ConfigError(
                f"sparsity.masks: {path} has no mask of {name}; leave the layer dense with "
                f"sparsity.rules: [{{layers: [{name}], density: 1}}]"
            )
        mask = found[name]
        if mask.shape != layer.shape:
            raise ConfigError(
                f"sparsity.masks: the mask of {name} in {path} is for a matrix {mask.shape[0]} x "
                f"{mask.shape[1]}, and this model's is {layer.shape[0]} x {layer.shape[1]}"
            )
        kept[name] = _as(mask, layer, path)
    return kept


def _as(mask: Mask, layer: Sparse, path: Path) -> Tensor:
    """The mask in the blocks of a layer's granularity."""
    granularity = layer.granularity
    fault = ConfigError(
        f"sparsity.masks: the mask of {layer.name} in {path} is not {granularity.text} of density "
        f"{layer.density:g} (it keeps {mask.density:.4g}); set sparsity.granularity and density as "
        "it was made"
    )
    kept = mask.kept
    if mask.block != granularity.block:
        if granularity.block != (1, 1):
            raise fault
        kept = mask.box((0, 0), mask.shape)
    if granularity.m:
        (rows, columns), m = kept.shape, granularity.m
        across = kept.view(rows, columns // m, m).sum(2)
        down = kept.view(rows // m, m, columns).sum(1) if granularity.both else across
        fits = bool((across <= granularity.n).all() and (down <= granularity.n).all())
    else:
        fits = abs(float(kept.double().mean()) - layer.density) <= 0.01
    if not fits:
        raise fault
    assert kept.dtype == torch.bool
    return kept
