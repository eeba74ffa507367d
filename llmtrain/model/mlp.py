"""The MLP branch: SwiGLU with fused gate and up projections, or a plain activation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmtrain.config.schema import ModelConfig
from llmtrain.linear import Linear, Matmul


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up of [..., 2 f], saving only that input."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, -1)
        out = torch.empty_like(gate_up)
        d_gate, d_up = out.chunk(2, -1)
        torch.mul(F.silu(gate), grad, out=d_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=d_gate)
        return out


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer 2020). gate_up: [..., 2 f], gate first -> [..., f]."""
    out: Tensor = _SwiGLU.apply(gate_up)  # type: ignore[no-untyped-call]
    return out


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": F.relu,
    "silu": F.silu,
    "swiglu": swiglu,
}


class MLP(nn.Module):
    """down(activation(up(x))), or down(silu(gate(x)) * up(x)) with gate and up in one weight.

    x: [b, s, d_model] -> the same. Gated: ``up.weight`` is [2 d_ff, d_model], gate rows first.
    """

    def __init__(self, cfg: ModelConfig, matmul: Matmul) -> None:
        super().__init__()
        assert cfg.d_ff is not None
        self.gated = cfg.activation == "swiglu"
        width = 2 * cfg.d_ff if self.gated else cfg.d_ff
        self.up = Linear(cfg.d_model, width, cfg.mlp_bias, matmul=matmul)
        self.down = Linear(cfg.d_ff, cfg.d_model, cfg.mlp_bias, matmul=matmul)
        self.activation = ACTIVATIONS[cfg.activation]

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(self.activation(self.up(x)))
        return out
