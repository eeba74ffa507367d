"""Low-rank adapters of linear layers: y + scale B A x (LoRA, Hu et al. 2021, 2106.09685).

A and B are linear layers of their own beside the adapted one, with placements that follow from
its placement, so that they run under every layout without collectives of their own:

===========  ==================  =====================  ==========================
layer        A [r, in]           B [out, r]             what travels
===========  ==================  =====================  ==========================
replicated   replicated          replicated             nothing
column       replicated          column                 r values a token
row          row                 replicated             r values a token
===========  ==================  =====================  ==========================

A fused layer (q, k and v; gate and up) holds several matrices in its rows. Each has r rows of A
to itself, as if it stood alone; a row of B reads those of its own matrix.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from llmtrain.linear.linear import Linear
from llmtrain.linear.matmul import Matmul, matmul_for
from llmtrain.linear.operand import Operand
from llmtrain.linear.placement import Placement
from llmtrain.parallel.tensor import local


class SideLinear(Linear):
    """A or B. partial: each tensor-parallel rank sees other tokens through the whole weight, so
    that gradients are summed over them."""

    def __init__(self, n_in: int, n_out: int, *, partial: bool, **options: Any) -> None:
        super().__init__(n_in, n_out, role="adapter", **options)
        self.partial = partial

    def tensor_partial(self, name: str) -> bool:
        return self.partial

    def parts(self) -> tuple[Tensor, Tensor | None]:
        return local(self.weight, partial=self.partial), None


class Spread(SideLinear):
    """B of a fused layer: weight [out, r] acts on [n, parts r], each row on the r values of its
    own matrix.

    pattern: which matrix each row belongs to, repeated over the rows; -1: none, the row is not
    adapted.
    """

    def __init__(self, n_in: int, n_out: int, *, pattern: list[int], **options: Any) -> None:
        super().__init__(n_in, n_out, **options)
        self.pattern, self.n_parts = pattern, max(pattern) + 1

    def parts(self) -> tuple[Tensor, Tensor | None]:
        weight, _ = super().parts()
        return self.spread(weight), None

    def spread(self, weight: Tensor) -> Tensor:
        """[out, r] -> [out, parts r] with zeros where another matrix' values are."""
        own = torch.tensor(self.pattern, device=weight.device).repeat(
            len(weight) // len(self.pattern)
        )
        mask = own[:, None] == torch.arange(self.n_parts, device=weight.device)
        wide: Tensor = (weight[:, None, :] * mask[:, :, None]).flatten(1)
        return wide

    def _operand(self, weight: Tensor) -> Operand:
        # Not cached: it is a new tensor each time.
        return self.matmul.operand(weight, self.plan.weight_reach)


class LowRank(nn.Module):
    """The adapter of ``layer``. a.weight: [parts rank, in]; b.weight: [out, rank], zero at first.

    scale: multiplies B A. pattern: of ``Spread``; [0] for a layer that is one matrix.
    """

    def __init__(self, layer: Linear, rank: int, scale: float, pattern: list[int]) -> None:
        super().__init__()
        self.rank, self.scale, self.pattern = rank, scale, pattern
        self.awake = True
        tensor = layer.plan.tensor
        by_tokens = tensor is not None and tensor.sequence
        plain: Matmul = matmul_for(layer.matmul.dtype)
        column, row = (layer.placement is p for p in (Placement.COLUMN, Placement.ROW))
        shared: dict[str, Any] = {"matmul": plain, "tensor": tensor}
        self.a = SideLinear(
            layer.in_features,
            (max(pattern) + 1) * rank,
            placement=Placement.ROW if row else Placement.REPLICATED,
            partial=by_tokens and column,
            **shared,
        )
        options = {
            "placement": Placement.COLUMN if column else Placement.REPLICATED,
            "partial": by_tokens and row,
            "scale": scale,
            **shared,
        }
        sizes = (rank, layer.out_features)
        self.b: SideLinear = (
            SideLinear(*sizes, **options)
            if pattern == [0]
            else Spread(*sizes, pattern=pattern, **options)
        )

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """y, the layer's own result for x, plus the adapter's; shapes as in ``Linear.forward``.
        y alone while the adapter is not ``awake``."""
        if not self.awake:
            return y
        out: Tensor = y + self.b(self.a(x))
        return out


def low_rank_change(a: Tensor, b: Tensor, scale: float, pattern: list[int]) -> Tensor:
    """What an adapter adds to the weight: scale B A, [out, in] float32.

    a: [parts rank, in], b: [out, rank], whole tensors. A row of b meets the rows of a of its own
    matrix (``pattern``, see ``Spread``).
    """
    rank = b.shape[1]
    out = torch.zeros(len(b), a.shape[1], dtype=torch.float32)
    rows = torch.tensor(pattern).repeat(len(b) // len(pattern))
    for part in range(max(pattern) + 1):
        own = rows == part
        product = b[own].double() @ a[part * rank : (part + 1) * rank].double()
        out[own] = (scale * product).float()
    return out
