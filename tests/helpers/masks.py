"""Masks of a sparse run, as its checkpoint has them."""

from __future__ import annotations

from pathlib import Path

from helpers.stored import stored
from torch import Tensor

from llmtrain.config import load_config
from llmtrain.model.resolve import resolve_model
from llmtrain.sparsity import sparse_layers, unpack_bits


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
