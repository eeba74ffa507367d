"""The MLP branch: SwiGLU with fused gate and up projections, or a plain activation."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from llmtrain.config.schema import ModelConfig
from llmtrain.linear import Linear, Matmul, Placement
from llmtrain.model.recompute import forgotten
from llmtrain.model.scaling import multiplier
from llmtrain.ops import Casts, activation_cast, fuses_activation, swiglu
from llmtrain.parallel.tensor import TensorParallel


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

    x: [..., d_model] -> the same, whole or a token shard among the ranks of ``tensor``. Gated:
    ``up.weight`` is [2 d_ff, d_model] with the rows of gate and up in turn, so a contiguous
    split along dim 0 is a split by channels (tensor parallelism).
    """

    def __init__(self, cfg: ModelConfig, matmul: Matmul, tensor: TensorParallel | None) -> None:
        super().__init__()
        assert cfg.d_ff is not None
        self.gated = cfg.activation == "swiglu"
        width = 2 * cfg.d_ff if self.gated else cfg.d_ff
        shared: dict[str, Any] = {"matmul": matmul, "tensor": tensor}
        self.up = Linear(
            cfg.d_model,
            width,
            cfg.mlp_bias,
            placement=Placement.COLUMN,
            scale=multiplier(cfg, "hidden", cfg.d_model),
            **shared,
        )
        self.down = Linear(
            cfg.d_ff,
            cfg.d_model,
            cfg.mlp_bias,
            placement=Placement.ROW,
            scale=multiplier(cfg, "hidden", cfg.d_ff),
            **shared,
        )
        self.name, self.activation = cfg.activation, ACTIVATIONS[cfg.activation]

    def forward(self, x: Tensor, lean: bool = False, casts: Casts | None = None) -> Tensor:
        """lean: the result of the activation is computed again in backward. casts: x as ``up``
        reads it, where its producer has cast it."""
        if self.down.takes_casts(x) and fuses_activation(x, self.name):
            return self._run_fused(x, casts)
        inner = self.up(x, casts)
        active = self.activation(inner)
        again, kept = self.activation, inner.detach()
        # ReLU keeps its result and not its input.
        lean = lean and again is not F.relu
        with forgotten(active, lambda: again(kept)) if lean else nullcontext():
            out: Tensor = self.down(active)
        return out

    def _run_fused(self, x: Tensor, casts: Casts | None) -> Tensor:
        """The activation with its cast for ``down``, and in backward with that for ``up``. Nothing
        of its result but the FP8 copy is kept."""
        handoff = self.up.handoff(x)
        inner = self.up(x, casts, handoff)
        turned, reads = self.down.wants(inner)
        active, down_casts = activation_cast(inner, self.name, turned, reads, handoff)
        out: Tensor = self.down(active, down_casts)
        return out
