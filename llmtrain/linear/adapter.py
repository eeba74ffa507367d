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
to itself, as if it stood alone; a row of B reads those of its own matrix. Where matrices differ in
rank, r is the largest, and what the others do not use is zero and stays so: its gradients are.

DoRA (Liu et al. 2024, 2402.09353, eq. 5 and section 4.3) trains the length m of each row of the
adapted weight besides: y = m / |V| V x with V = W + scale B A, |V| the lengths of the rows of V
without a gradient through them. Of a row-parallel layer each rank holds part of every row, and the
squares are summed over the ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import Placement as TensorPlacement

from llmtrain.linear.function import Plan
from llmtrain.linear.linear import Linear
from llmtrain.linear.matmul import Matmul, thin_matmul_for
from llmtrain.linear.operand import Operand
from llmtrain.linear.placement import Placement
from llmtrain.parallel.collectives import all_reduce
from llmtrain.parallel.tensor import local
from llmtrain.parallel.uncompiled import uncompiled


class Spread(Linear):
    """B of a fused layer: weight [out, r] acts on [n, parts r], each row on the r values of its
    own matrix.

    pattern: which matrix each row belongs to, repeated over the rows; -1: none, the row is not
    adapted. factors: what each matrix' rows are multiplied by besides ``scale``.
    """

    def __init__(
        self, n_in: int, n_out: int, *, pattern: list[int], factors: list[float], **options: Any
    ) -> None:
        super().__init__(n_in, n_out, **options)
        self.pattern, self.n_parts, self.factors = pattern, max(pattern) + 1, factors

    def parts(self) -> tuple[Tensor, Tensor | None]:
        weight, _ = super().parts()
        return self.spread(weight), None

    def spread(self, weight: Tensor) -> Tensor:
        """[out, r] -> [out, parts r] with zeros where another matrix' values are."""
        own = _rows_of(self.pattern, len(weight), weight.device)
        mask = own[:, None] == torch.arange(self.n_parts, device=weight.device)
        if any(factor != 1.0 for factor in self.factors):
            mask = mask * torch.tensor(self.factors, device=weight.device)
        wide: Tensor = (weight[:, None, :] * mask[:, :, None]).flatten(1)
        return wide

    def _operand(self, weight: Tensor) -> Operand:
        # Not cached: it is a new tensor each time.
        return self.matmul.operand(weight, self.plan.weight_reach)


class Magnitude(nn.Module):
    """m of DoRA, [out] float32: the length of each row of the adapted weight.

    Rows that are not adapted have 0 there, which nothing reads.
    """

    def __init__(self, n_out: int, column: bool, partial: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_out, dtype=torch.float32))
        self.placement = Shard(0) if column else Replicate()
        self.partial = partial

    def tensor_placement(self, name: str) -> TensorPlacement:
        """Placement of the parameter on the tensor dimension of the mesh."""
        return self.placement

    def tensor_partial(self, name: str) -> bool:
        """Whether this rank's gradient is one summand of it."""
        return self.partial


class LowRank(nn.Module):
    """The adapter of ``layer``. a.weight: [parts rank, in]; b.weight: [out, rank], zero at first;
    with ``directed``, magnitude.weight: [out].

    ranks, scales: of each matrix; a scale multiplies its B A. pattern: of ``Spread``; [0] for a
    layer that is one matrix. directed: DoRA. sharded: FSDP2 gathers and frees the weights.
    merged: the layer's weight holds the adapter already, which adds nothing then; kept: what the
    weight was, as ``model.merging`` puts it there.
    """

    def __init__(
        self,
        layer: Linear,
        ranks: list[int],
        scales: list[float],
        pattern: list[int],
        directed: bool = False,
    ) -> None:
        super().__init__()
        self.ranks, self.rank, self.scales, self.pattern = ranks, max(ranks), scales, pattern
        self.awake, self.merged = True, False
        self.kept: list[Tensor] | None = None
        tensor = layer.plan.tensor
        by_tokens = tensor is not None and tensor.sequence
        plain: Matmul = thin_matmul_for(layer.matmul.dtype)
        column, row = (layer.placement is p for p in (Placement.COLUMN, Placement.ROW))
        shared: dict[str, Any] = {"matmul": plain, "tensor": tensor, "role": "adapter"}
        self.a = Linear(
            layer.in_features,
            (max(pattern) + 1) * self.rank,
            placement=Placement.ROW if row else Placement.REPLICATED,
            **shared,
        )
        options = {
            "placement": Placement.COLUMN if column else Placement.REPLICATED,
            "scale": scales[0],
            **shared,
        }
        sizes = (self.rank, layer.out_features)
        factors = [scale / scales[0] for scale in scales]
        self.b: Linear = (
            Linear(*sizes, **options)
            if pattern == [0]
            else Spread(*sizes, pattern=pattern, factors=factors, **options)
        )
        self.directed, self.sharded = directed, False
        self._known: tuple[tuple[tuple[int, int], ...], Tensor] | None = None
        self.magnitude: Magnitude | None = None
        if directed:
            self.magnitude = Magnitude(layer.out_features, column, by_tokens and row)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """y, the layer's own result for x, plus the adapter's; shapes as in ``Linear.forward``.
        y alone while the adapter is not ``awake`` or ``merged``."""
        if not self.awake or self.merged:
            return y
        out: Tensor = y + self.b(self.a(x))
        return out

    def direct(self, z: Tensor, stored: Tensor, read: Callable[[], Tensor], plan: Plan) -> Tensor:
        """z, the result of ``forward`` without bias, times m / |V|. read: the layer's weight as its
        products read it, this rank's part; stored: what it is read from."""
        if not self.awake or self.merged:
            return z
        assert self.magnitude is not None
        length = local(self.magnitude.weight, partial=self.magnitude.partial)
        lengths = self._cached_lengths(stored, read, plan)
        # Both rounded as FSDP2 gathers m, so that every layout computes the same; 1 at the start.
        factor = length.to(z.dtype).float() / lengths.to(z.dtype).float()
        own = _rows_of(self.pattern, len(lengths), lengths.device) >= 0
        out: Tensor = _ScaleRows.apply(z, torch.where(own, factor, 1.0))  # type: ignore[no-untyped-call]
        return out

    def _cached_lengths(self, stored: Tensor, read: Callable[[], Tensor], plan: Plan) -> Tensor:
        """``lengths``, computed once for the micro-batches of a step, recomputed forwards and the
        tokens of a generation. FSDP2 fills the same memory anew without a new version."""
        run = self.lengths if plan.tensor is None else self._lengths_in_group
        if self.sharded or torch.compiler.is_compiling():
            return run(read(), plan)
        parts = (stored, local(self.a.weight), local(self.b.weight))
        key = tuple((part._version, part.data_ptr()) for part in parts)
        if self._known is None or self._known[0] != key:
            with torch.inference_mode(False), torch.no_grad():
                self._known = (key, run(read(), plan))
        return self._known[1]

    @torch.no_grad()
    def lengths(self, weight: Tensor, plan: Plan) -> Tensor:
        """|V| of each row [out], float32; infinite for a row of zeros, which has no direction and
        stays zero. Collective over the ranks of a row-parallel layer."""
        # As their products read them, and FSDP2 gathers them: the same in every layout.
        a, b = (local(x.weight).to(x.matmul.dtype).float() for x in (self.a, self.b))
        weight = weight.float()
        own = _rows_of(self.pattern, len(weight), weight.device)
        part = own.clamp(min=0)
        scales = torch.where(own >= 0, torch.tensor(self.scales, device=weight.device)[part], 0.0)
        rows = a.view(-1, self.rank, a.shape[1])
        # |W + s B A|^2 without the product B A, which is as large as W.
        cross = (weight @ a.t()).view(len(weight), -1, self.rank)
        mixed = cross[torch.arange(len(weight), device=weight.device), part] * b
        gram = (b[:, None, :] @ (rows @ rows.mT)[part]).squeeze(1) * b
        square = plan.scale**2 * (weight * weight).sum(1)
        square += scales * (2 * plan.scale * mixed.sum(1) + scales * gram.sum(1))
        if plan.row is not None:
            square = all_reduce(square, plan.row.group)
        # Rounding may leave a sum of squares that cancel below zero.
        return torch.where(square > 0, square, torch.inf).sqrt()

    # torch.compile cannot trace collectives on groups of its own.
    _lengths_in_group = uncompiled(lengths)


class _ScaleRows(torch.autograd.Function):
    """z [..., out] times a factor [out] in float32, rounded once. Saves z in its own dtype."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(z, factor)
        return (z * factor).to(z.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        z, factor = ctx.saved_tensors
        summed = (grad.flatten(0, -2) * z.flatten(0, -2).float()).sum(0)
        return (grad * factor).to(z.dtype), summed


def _rows_of(pattern: list[int], n_rows: int, device: torch.device) -> Tensor:
    """Which matrix each of so many rows belongs to, see ``Spread``."""
    return torch.tensor(pattern, device=device).repeat(n_rows // len(pattern))


@dataclass(frozen=True)
class Change:
    """An adapter as whole tensors: a [parts rank, in], b [out, rank], magnitude [out] or None.

    scales, pattern: see ``LowRank``.
    """

    a: Tensor
    b: Tensor
    scales: list[float]
    pattern: list[int]
    magnitude: Tensor | None = None


def adapted_weight(weight: Tensor, change: Change) -> Tensor:
    """The weight [out, in] float32 that computes what layer and adapter do, from the layer's own
    (with its multiplier): W + scale B A, its rows set to their lengths under DoRA.

    Each row is computed in float64 and rounded once; a row of b meets the rows of a of its own
    matrix. Rows that are not adapted are as they were.
    """
    rank = change.b.shape[1]
    out = weight.float().clone()
    rows = _rows_of(change.pattern, len(change.b), change.b.device)
    for part in range(max(change.pattern) + 1):
        own = rows == part
        a = change.a[part * rank : (part + 1) * rank].double()
        new = weight[own].double() + change.scales[part] * (change.b[own].double() @ a)
        if change.magnitude is not None:
            length = new.norm(dim=1)
            length[length == 0] = torch.inf  # as ``LowRank.lengths`` has it
            new *= (change.magnitude[own].double() / length)[:, None]
        out[own] = new.float()
    return out
