"""Tables of rotary positions (Su et al. 2021)."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=8)
def _table(length: int, d_head: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False), torch.no_grad():
        exponent = torch.arange(0, d_head, 2, dtype=torch.float64) / d_head
        angle = torch.arange(length, dtype=torch.float64)[:, None] / theta**exponent
        cos, sin = angle.cos(), angle.sin()
        return cos.to(device, torch.float32), sin.to(device, torch.float32)


def rotary_table(
    positions: Tensor | None, length: int, d_head: int, theta: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """cos and sin of position * theta^(-2i / d_head), i < d_head / 2.

    positions: [b, s] below ``length``, or None for 0..length-1. Returns two float32 tensors
    [b or 1, s, d_head / 2], computed in float64.
    """
    cos, sin = _table(length, d_head, theta, device)
    if positions is None:
        return cos[None], sin[None]
    return cos[positions], sin[positions]
