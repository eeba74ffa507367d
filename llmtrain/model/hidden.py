"""The hidden linear layers of a block, by name: whole ones or two factors."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llmtrain.config.schema import ModelConfig
from llmtrain.linear import Linear, Matmul, Operand, Placement
from llmtrain.model.layers import cut_dim, inner_width, layer_shape
from llmtrain.model.pair import Factorized, HiddenLayer
from llmtrain.model.scaling import multiplier
from llmtrain.parallel.collectives import gather_rows
from llmtrain.parallel.tensor import TensorParallel

_PLACEMENTS = {0: Placement.COLUMN, 1: Placement.ROW, None: Placement.REPLICATED}


class SharedGroupLinear(Linear):
    """The column-parallel q, k, v projection where several ranks share a key/value head.

    A rank stores its equal part of the rows and gathers those of its group's, from which it takes
    its own query heads and the shared key and value. Gradients are summed over the sharing ranks
    on the way back, each of which sees the key and value through its own queries only.
    sharing: those ranks. heads: (heads of a group, its key and value among them; width of a head).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        sharing: dist.ProcessGroup,
        heads: tuple[int, int],
        **options: Any,
    ) -> None:
        super().__init__(in_features, out_features, bias, **options)
        self.sharing, (self.slots, self.d_head) = sharing, heads

    @property
    def adaptable(self) -> bool:
        return False

    def parts(self) -> tuple[Tensor, Tensor | None]:
        weight, bias = super().parts()
        return self._own(weight), None if bias is None else self._own(bias)

    def _operand(self, weight: Tensor) -> Operand:
        # Not cached: the gathered rows are a new tensor each time.
        return self.matmul.operand(weight, self.plan.weight_reach)

    def _own(self, param: Tensor) -> Tensor:
        rows = gather_rows(param, self.sharing).view(self.slots, self.d_head, *param.shape[1:])
        queries = (self.slots - 2) // self.sharing.size()
        first = self.sharing.rank() * queries
        return torch.cat((rows[first : first + queries], rows[-2:])).flatten(0, 1)


def hidden_layer(
    cfg: ModelConfig, name: str, matmul: Matmul, tensor: TensorParallel | None
) -> HiddenLayer:
    """The layer ``name`` (blocks.3.mlp.up) of a resolved ``cfg``, without values."""
    if inner_width(cfg, name) is None:
        return _linear(cfg, name, matmul, tensor, _has_bias(cfg, name))
    assert cfg.factorized is not None
    return Factorized(
        _linear(cfg, f"{name}.u", matmul, tensor, False),
        _linear(cfg, f"{name}.v", matmul, tensor, _has_bias(cfg, name)),
        cfg.factorized.activation,
    )


def _has_bias(cfg: ModelConfig, layer: str) -> bool:
    if layer.endswith("attention.qkv"):
        return cfg.attention_bias
    return cfg.attention_out_bias if layer.endswith("attention.out") else cfg.mlp_bias


def _linear(
    cfg: ModelConfig, name: str, matmul: Matmul, tensor: TensorParallel | None, bias: bool
) -> Linear:
    rows, columns = layer_shape(cfg, name)
    placement = _PLACEMENTS[cut_dim(name)]
    options: dict[str, Any] = {"placement": placement, "matmul": matmul, "tensor": tensor}
    options["scale"] = multiplier(cfg, "hidden", columns)
    queries = "attention.qkv" in name and placement is Placement.COLUMN
    if queries and tensor is not None and tensor.kv_group is not None:
        assert cfg.n_kv_heads is not None and cfg.d_head is not None
        heads = (cfg.n_heads // cfg.n_kv_heads + 2, cfg.d_head)
        return SharedGroupLinear(columns, rows, bias, tensor.kv_group, heads, **options)
    return Linear(columns, rows, bias, **options)
