"""SwiGLU (Shazeer 2020): silu(gate) * up, keeping only its input for backward."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llmtrain.ops.native import kernels, usable


class _Reference(torch.autograd.Function):
    """Elementwise passes without saved intermediates, nor in-place ones, which recomputation
    under torch.compile does not allow."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, -1)
        d_up = F.silu(gate) * grad
        d_gate = torch.ops.aten.silu_backward(grad * up, gate)
        return torch.cat((d_gate, d_up), -1)


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
    """silu(gate) * up of [..., 2 f], gate first, in plain PyTorch -> [..., f]."""
    out: Tensor = _Reference.apply(gate_up)  # type: ignore[no-untyped-call]
    return out


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of [..., 2 f], gate first -> [..., f] of the same dtype."""
    if not usable(gate_up):
        return swiglu_reference(gate_up)
    out: Tensor = _Native.apply(gate_up)  # type: ignore[no-untyped-call]
    return out
