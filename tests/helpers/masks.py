"""Masks of a sparse run, as its checkpoint has them, and such as GPUs have products for."""

from __future__ import annotations

from pathlib import Path

import torch
from helpers.stored import stored
from torch import Tensor

from llmtrain.config import load_config
from llmtrain.linear import BLOCKS, Mask
from llmtrain.model.resolve import resolve_model
from llmtrain.ops.masking import transposable_mask_reference
from llmtrain.sparsity import parse_granularity, prune_again, sparse_layers, unpack_bits


def stored_masks(run: Path, step: int) -> dict[str, Tensor]:
    """The masks of a checkpoint of one process, by layer, element by element."""
    cfg, bits = load_config(run / "config.yaml"), stored(run, step)
    assert cfg.sparsity is not None
    found = {}
    for name, layer in sparse_layers(resolve_model(cfg, 257), cfg.sparsity).items():
        whole = ("qkv.u", "up.u", "out.v", "down.v")  # on every tensor-parallel rank
        rows = ("attention.out", "mlp.down", "out.u", "down.u")
        dim = 0 if name.endswith((*rows, *whole)) else 1
        grid, (high, wide) = layer.granularity.grid(layer.shape), layer.granularity.block
        blocks = unpack_bits(bits[f"hook.sparsity.{name}"], grid[dim], dim)
        found[name] = blocks.repeat_interleave(high, 0).repeat_interleave(wide, 1)
    return found


def products_masks(
    kind: str, shape: tuple[int, int], device: str = "cpu"
) -> tuple[Mask, Mask | None]:
    """A random mask, and the one of backward where that is another. kind: ``BLOCKS`` (of 64x64),
    2:4, 2:4t or slope."""
    gen = torch.Generator().manual_seed(3)
    rows, columns = shape
    if kind == BLOCKS:
        grid = (-(-rows // 64), -(-columns // 64))
        kept = torch.rand(grid, generator=gen) < 0.3
        kept[-1, -1], kept[0, 0] = False, True
        return Mask(kept.to(device), (64, 64), shape), None
    if kind == "2:4t":
        kept = transposable_mask_reference(torch.rand(shape, generator=gen))
        return Mask(kept.to(device), (1, 1), shape), None
    ranks = torch.rand(rows, columns // 4, 4, generator=gen).argsort(-1).argsort(-1)
    mask = Mask((ranks < 2).view(shape).to(device), (1, 1), shape)
    if kind == "2:4":
        return mask, None
    kept = prune_again(parse_granularity("2:4"), mask.kept, (1, "a"), 0, (columns, 0))
    return mask, Mask(kept, (1, 1), shape)
