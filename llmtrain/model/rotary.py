"""Rotary position embedding (Su et al. 2021), rotating the two halves of a head."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor


@lru_cache(maxsize=8)
def _table(
    length: int, d_head: int, theta: float, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False), torch.no_grad():
        exponent = torch.arange(0, d_head, 2, dtype=torch.float64) / d_head
        angle = torch.arange(length, dtype=torch.float64)[:, None] / theta**exponent
        return angle.cos().to(device, dtype), angle.sin().to(device, dtype)


def rotary_table(
    positions: Tensor | None, length: int, d_head: int, theta: float, like: Tensor
) -> tuple[Tensor, Tensor]:
    """cos and sin of position * theta^(-2i/d_head), i < d_head/2, in the dtype of ``like``.

    positions: [b, s] below ``length``, or None for 0..length-1. Returns two tensors shaped
    [b or 1, s, 1, d_head/2], computed in float64.
    """
    cos, sin = _table(length, d_head, theta, like.dtype, like.device)
    if positions is None:
        return cos[None, :, None], sin[None, :, None]
    return cos[positions][:, :, None], sin[positions][:, :, None]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor, sign: int) -> None:
    """out = the pairs (x[i], x[i + d/2]) turned by the angle (sign 1) or back (sign -1)."""
    half = x.shape[-1] // 2
    x1, x2 = x[..., :half], x[..., half:]
    o1, o2 = out[..., :half], out[..., half:]
    torch.mul(x1, cos, out=o1).addcmul_(x2, sin, value=-sign)
    torch.mul(x2, cos, out=o2).addcmul_(x1, sin, value=sign)


class _SplitRotary(torch.autograd.Function):
    """Fused projections [b, s, g, r + 2, d] to rotated q and k and plain v."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        b, s, groups, slots, d = qkv.shape
        ctx.save_for_backward(cos, sin)
        ctx.shape = qkv.shape
        q = qkv.new_empty(b, s, groups, slots - 2, d)
        k = qkv.new_empty(b, s, groups, d)
        _rotate(qkv[..., :-2, :], cos.unsqueeze(-2), sin.unsqueeze(-2), q, 1)
        _rotate(qkv[..., -2, :], cos, sin, k, 1)
        return q.view(b, s, -1, d), k, qkv[..., -1, :].contiguous()

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        b, s, groups, slots, d = ctx.shape
        out = dq.new_empty(ctx.shape)
        dq = dq.reshape(b, s, groups, slots - 2, d)
        _rotate(dq, cos.unsqueeze(-2), sin.unsqueeze(-2), out[..., :-2, :], -1)
        _rotate(dk, cos, sin, out[..., -2, :], -1)
        out[..., -1, :].copy_(dv)
        return out, None, None


def split_rotary(qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Split fused projections and rotate queries and keys.

    qkv: [b, s, g, r + 2, d]: per key/value group its r query heads, the key, the value.
    cos, sin: from ``rotary_table``. Returns q [b, s, g * r, d], k and v [b, s, g, d].
    """
    out: tuple[Tensor, Tensor, Tensor] = _SplitRotary.apply(qkv, cos, sin)  # type: ignore[no-untyped-call]
    return out


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate heads x [b, s, h, d]; differentiable by autograd. For normalised q and k."""
    x1, x2 = x.chunk(2, -1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), -1)
