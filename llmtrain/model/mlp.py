"""The MLP branch: SwiGLU with fused gate and up projections, or a plain activation."""

from __future__ import annotations

from torch import Tensor, nn

from llmtrain.config.schema import ModelConfig
from llmtrain.linear import Matmul
from llmtrain.model.hidden import hidden_layer
from llmtrain.model.pair import run_pair
from llmtrain.ops import Casts
from llmtrain.parallel.tensor import TensorParallel


class MLP(nn.Module):
    """down(activation(up(x))), or down(silu(gate(x)) * up(x)) with gate and up in one weight.

    x: [..., d_model] -> the same, whole or a token shard among the ranks of ``tensor``. Gated:
    ``up.weight`` is [2 d_ff, d_model] with the rows of gate and up in turn, so a contiguous
    split along dim 0 is a split by channels (tensor parallelism). index: of the block.
    """

    def __init__(
        self, cfg: ModelConfig, matmul: Matmul, tensor: TensorParallel | None, index: int = 0
    ) -> None:
        super().__init__()
        self.up = hidden_layer(cfg, f"blocks.{index}.mlp.up", matmul, tensor)
        self.down = hidden_layer(cfg, f"blocks.{index}.mlp.down", matmul, tensor)
        self.activation = cfg.activation

    def forward(self, x: Tensor, lean: bool = False, casts: Casts | None = None) -> Tensor:
        """lean: the result of the activation is computed again in backward. casts: x as ``up``
        reads it, where its producer has cast it."""
        return run_pair(self.up, self.down, self.activation, x, lean, casts)
