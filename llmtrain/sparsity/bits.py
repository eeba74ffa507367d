"""Masks packed to bits: how they lie in checkpoints and beside exported weights."""

from __future__ import annotations

import torch
from torch import Tensor

_PLACES = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)


def pack_bits(kept: Tensor, dim: int = 1) -> Tensor:
    """Bool [r, c] -> uint8 with eight values of ``dim`` in a byte, the first in the lowest bit."""
    if dim == 0:
        return pack_bits(kept.t()).t().contiguous()
    rows, columns = kept.shape
    padded = torch.nn.functional.pad(kept.to(torch.uint8), (0, -columns % 8))
    places = _PLACES.to(kept.device)
    return (padded.view(rows, -1, 8) * places).sum(-1, dtype=torch.uint8)


def unpack_bits(bits: Tensor, size: int, dim: int = 1) -> Tensor:
    """The inverse of ``pack_bits``; size: of ``dim``."""
    if dim == 0:
        return unpack_bits(bits.t(), size).t().contiguous()
    places = _PLACES.to(bits.device)
    return (bits[:, :, None] & places).ne(0).flatten(1)[:, :size].contiguous()
