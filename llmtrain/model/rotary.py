"""Tables of rotary positions (Su et al. 2021)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from llmtrain.config.rope import RopeScalingConfig


@dataclass(frozen=True)
class Rotation:
    """What turns a head: its width d, the base theta, how the frequencies are stretched, and the
    part of the head that turns at all."""

    d_head: int
    theta: float
    scaling: RopeScalingConfig | None = None
    fraction: float = 1.0

    @property
    def turned(self) -> int:
        """Dimensions that turn."""
        return int(self.d_head * self.fraction)

    def frequencies(self) -> Tensor:
        """Angle per position of every pair, theta^(-2i / d) before scaling: [d / 2] float64.

        llama3 (2407.21783): with n the turns of a frequency in the original length, those of
        n < low_freq_factor are divided by ``factor``, those of n > high_freq_factor kept, and
        between the two the frequency is interpolated linearly in n. With a fraction the pairs
        beyond it do not turn (frequency 0), and d is the width that does.
        """
        width = self.turned
        plain = self.theta ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
        still = torch.zeros((self.d_head - width) // 2, dtype=torch.float64)
        return torch.cat((self._stretched(plain), still))

    def _stretched(self, plain: Tensor) -> Tensor:
        scaling = self.scaling
        if scaling is None:
            return plain
        divided = plain / scaling.factor
        if scaling.kind == "linear":
            return divided
        turns = scaling.original_max_position * plain / (2 * math.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        return kept * plain + (1 - kept) * divided


@lru_cache(maxsize=8)
def _table(length: int, rotation: Rotation, device: torch.device) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False), torch.no_grad():
        positions = torch.arange(length, dtype=torch.float64)[:, None]
        angle = positions * rotation.frequencies()
        cos, sin = angle.cos(), angle.sin()
        return cos.to(device, torch.float32), sin.to(device, torch.float32)


def rotary_table(
    positions: Tensor | None, length: int, rotation: Rotation, device: torch.device
) -> tuple[Tensor, Tensor]:
    """cos and sin of position times frequency.

    positions: [b, s] below ``length``, or None for 0..length-1. Returns two float32 tensors
    [b or 1, s, d_head / 2], computed in float64.
    """
    cos, sin = _table(length, rotation, device)
    if positions is None:
        return cos[None], sin[None]
    return cos[positions], sin[positions]
