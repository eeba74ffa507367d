"""Rotary positions (Su et al. 2021) applied while the fused projections are split."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmtrain.ops.native import kernels, usable


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (x[i], x[i + d/2]) by the angles of cos and sin.

    x: [b, h, s, d]; cos, sin: [1 or b, s, d/2] float32. Returns x's shape and dtype.
    """
    cos, sin = cos.to(x.dtype)[:, None], sin.to(x.dtype)[:, None]
    x1, x2 = x.chunk(2, -1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), -1)


def split_rotary_reference(qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``split_rotary`` in plain PyTorch."""
    b, s, groups, slots, d = qkv.shape
    q, k, v = qkv[..., :-2, :], qkv[..., -2, :], qkv[..., -1, :]
    q = q.reshape(b, s, groups * (slots - 2), d).transpose(1, 2)
    # A view of v would keep all of qkv until backward.
    k, v = k.transpose(1, 2), v.contiguous().transpose(1, 2)
    return rotate(q, cos, sin), rotate(k, cos, sin), v


class _Native(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        q, k, v = kernels().rotary_split(qkv.contiguous(), cos, sin)
        return q, k, v

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor, None, None]:
        parts = [x if x.stride(-1) == 1 else x.contiguous() for x in (dq, dk, dv)]
        return kernels().rotary_merge(*parts, *ctx.saved_tensors), None, None


def split_rotary(qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Split fused projections into heads and turn queries and keys by their positions.

    qkv: [b, s, g, r + 2, d]: for each of g groups its r query heads, the key and the value.
    cos, sin: [1 or b, s, d/2] float32. Returns q [b, g r, s, d], k and v [b, g, s, d].
    """
    if not usable(qkv):
        return split_rotary_reference(qkv, cos, sin)
    out: tuple[Tensor, Tensor, Tensor] = _Native.apply(qkv, cos, sin)  # type: ignore[no-untyped-call]
    return out
