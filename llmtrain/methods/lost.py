"""LOST: low-rank and channel-wise sparse weights, trained from scratch (2508.02668).

Each initial weight W = U S V^T gives both parts. The low-rank one takes the top r singular
triplets, B = U_r S_r^(1/2) and A = S_r^(1/2) V_r^T; of what remains, R = W - B A, the columns
(input channels) of the largest norms are kept. Then

    y = gamma B A x + (1 - gamma) R_kept x

and B, A and the kept columns learn. The low-rank part is an adapter (``model.adapters`` with
``freeze: false``; one SVD for each matrix of a fused layer), the columns are a static mask. Gamma
and 1 - gamma are put into the initial values, so that the model is computed as any other with
adapters; that they are no factors during training is our simplification. The paper's abstract and
memory are the source: its official code was not at hand.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmtrain.config import RunConfig
from llmtrain.data.plan import DataPlan
from llmtrain.errors import ConfigError
from llmtrain.linear import LowRank
from llmtrain.methods.sparsity import StaticMask
from llmtrain.model import ADAPTER, adapted_parts, resolve_model
from llmtrain.parallel import local_boxes, whole
from llmtrain.sparsity import Masks, largest

if TYPE_CHECKING:
    from llmtrain.train.trainer import Trainer


def split_weight(
    weight: Tensor, rows: Tensor, rank: int, density: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """B [out, r], A [parts r, in], the rest R [out, in] and its kept columns, bool [in].

    rows: int64 [out], the matrix of its own that each row belongs to. All float64 but the mask.
    """
    wide = weight.double()
    parts = int(rows.max()) + 1
    a = wide.new_zeros(parts * rank, wide.shape[1])
    b = wide.new_zeros(len(wide), rank)
    rest = wide.clone()
    for part in range(parts):
        own = rows == part
        u, s, v = torch.linalg.svd(wide[own], full_matrices=False)
        root = s[:rank].sqrt()
        b[own], a[part * rank : (part + 1) * rank] = u[:, :rank] * root, root[:, None] * v[:rank]
        rest[own] -= b[own] @ a[part * rank : (part + 1) * rank]
    kept = largest(rest.norm(dim=0), max(round(density * rest.shape[1]), 1))
    return b, a, rest, kept


class Lost(StaticMask):
    """Low-rank adapters and kept columns out of the initial weights."""

    def check(self, cfg: RunConfig, plan: DataPlan) -> None:
        """Every sparse layer needs an adapter for all its rows."""
        super().check(cfg, plan)
        model_cfg = resolve_model(cfg, plan.vocab_size)
        for name, layer in self._sparse.items():
            whole = {"attention.qkv": 3, "mlp.up": 2 if model_cfg.activation == "swiglu" else 1}
            wanted = whole.get(name.split(".", 2)[2], 1)
            found = adapted_parts(model_cfg, name) if model_cfg.adapters is not None else ()
            if len(found) != wanted:
                raise ConfigError(
                    f"model.adapters.targets: lost needs an adapter of all of {name}; adapt it, or "
                    f"leave it dense with sparsity.rules: [{{layers: [{name}], density: 1}}]"
                )
            least = min(layer.shape[1], layer.shape[0] // wanted)
            if max(part.rank for part in found) > least:
                raise ConfigError(
                    f"model.adapters.rank: {name} has no {max(part.rank for part in found)} "
                    f"singular values in each matrix; use at most {least}"
                )

    def first(self, trainer: Trainer, masks: Masks) -> None:
        """Split the weights that the run begins with."""
        params = trainer.module.params
        for name, layer in masks.layers.items():
            side = layer.adapter
            assert isinstance(side, LowRank)
            weight = whole(masks.params[name].detach())
            rows = torch.tensor(side.pattern, device=weight.device)
            rows = rows.repeat(len(weight) // len(rows))
            density = masks.sparse[name].density
            b, a, rest, kept = split_weight(weight, rows, side.rank, density)
            scales = torch.tensor(side.scales, device=weight.device, dtype=torch.float64)
            b *= (self.cfg.gamma * layer.plan.scale / scales)[rows][:, None]
            values = {name: (1 - self.cfg.gamma) * rest}
            values |= {f"{name}{ADAPTER}a": a, f"{name}{ADAPTER}b": b}
            _fill(params, values)
            masks.take_whole(name, kept.expand(len(weight), -1))
        trainer.module.weights_changed()


@torch.no_grad()
def _fill(params: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Set weights of any layout to whole ``values``, by layer."""
    for name, value in values.items():
        for local, (top, left) in local_boxes(params[f"{name}.weight"].detach()):
            high, wide = local.shape
            local.copy_(value[top : top + high, left : left + wide])
