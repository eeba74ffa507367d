"""SwiGLU (Shazeer 2020): silu(gate) * up, keeping only its input for backward."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llmtrain.ops.native import kernels, usable


def _parts(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    gate, up = gate_up.view(*gate_up.shape[:-1], gate_up.shape[-1] // 2, 2).unbind(-1)
    return gate, up


class _Reference(torch.autograd.Function):
    """Elementwise passes without saved intermediates, nor in-place ones, which recomputation
    under torch.compile does not allow."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = _parts(gate_up)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = _parts(gate_up)
        d_up = F.silu(gate) * grad
        d_gate = torch.ops.aten.silu_backward(grad * up, gate)
        return torch.stack((d_gate, d_up), -1).flatten(-2)


class _Native(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        gate_up = gate_up.contiguous()
        ctx.save_for_backward(gate_up)
        out: Tensor = kernels().swiglu(gate_up)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        out: Tensor = kernels().swiglu_backward(grad.contiguous(), *ctx.saved_tensors)
        return out


def swiglu_reference(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of [..., 2 f], gate and up in turn, in plain PyTorch -> [..., f]."""
    out: Tensor = _Reference.apply(gate_up)  # type: ignore[no-untyped-call]
    return out


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of [..., 2 f] -> [..., f] of the same dtype.

    Gate and up alternate along the last dimension: (gate_0, up_0, gate_1, up_1, ...).
    """
    if not usable(gate_up):
        return swiglu_reference(gate_up)
    out: Tensor = _Native.apply(gate_up)  # type: ignore[no-untyped-call]
    return out
