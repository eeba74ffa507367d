"""RMSNorm (Zhang & Sennrich 2019), alone or fused with the residual addition before it."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from llmtrain.ops.native import kernels, usable


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in the dtype of x."""
    return F.rms_norm(x, (x.shape[-1],), weight.to(x.dtype), eps)


class _RMSNorm(Function):
    """Without ``branch``: (x, norm(x)). With it: (x + branch, norm(x + branch))."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, branch: Tensor | None, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        x = x.contiguous()
        scale = weight.to(x.dtype)
        if branch is None:
            y, rstd = kernels().rms_norm(x, scale, eps)
        else:
            x, y, rstd = kernels().add_rms_norm(x, branch.contiguous(), scale, eps)
        ctx.save_for_backward(x, scale, rstd)
        ctx.weight_dtype, ctx.two = weight.dtype, branch is not None
        ctx.set_materialize_grads(False)
        return x, y

    @staticmethod
    def backward(
        ctx: Any, d_sum: Tensor | None, dy: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor, None]:
        x, scale, rstd = ctx.saved_tensors
        residual = None if d_sum is None else d_sum.contiguous()
        dx, d_weight = kernels().rms_norm_backward(dy.contiguous(), x, scale, rstd, residual)
        return dx, dx if ctx.two else None, d_weight.to(ctx.weight_dtype), None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension with float32 statistics.

    x: [..., d]; weight: [d] of any float dtype, used in the dtype of x. Returns x's shape, dtype.
    """
    if not usable(x):
        return rms_norm_reference(x, weight, eps)
    out: tuple[Tensor, Tensor] = _RMSNorm.apply(x, None, weight, eps)  # type: ignore[no-untyped-call]
    return out[1]


def add_rms_norm(
    x: Tensor, branch: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The residual stream after ``branch`` is added, and its RMSNorm, with one fused backward.

    x, branch: [..., d] of one dtype; branch None: nothing is added. Returns (x + branch, norm).
    """
    if not usable(x):
        total = x if branch is None else x + branch
        return total, rms_norm_reference(total, weight, eps)
    out: tuple[Tensor, Tensor] = _RMSNorm.apply(x, branch, weight, eps)  # type: ignore[no-untyped-call]
    return out
