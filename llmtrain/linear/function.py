"""The autograd function that runs every ``Matmul`` under every ``Placement``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llmtrain.linear.matmul import Matmul
from llmtrain.linear.placement import Placement
from llmtrain.parallel.collectives import (
    all_gather,
    all_reduce,
    reduce_scatter,
    start_all_gather,
    start_all_reduce,
    start_reduce_scatter,
)
from llmtrain.parallel.tensor import TensorParallel, pad_rows
from llmtrain.parallel.uncompiled import uncompiled


@dataclass(frozen=True)
class Plan:
    """How a product runs: number format, placement, the ranks that take part, and a constant
    ``scale`` that multiplies the product and both its gradients (but not the bias)."""

    matmul: Matmul
    placement: Placement = Placement.REPLICATED
    tensor: TensorParallel | None = None
    scale: float = 1.0

    @property
    def by_tokens(self) -> bool:
        """Whether input or output is a token shard, which knows rows only."""
        split = self.placement is not Placement.REPLICATED
        return split and self.tensor is not None and self.tensor.sequence

    @property
    def column(self) -> TensorParallel | None:
        """The group of a column-parallel layer."""
        return self.tensor if self.placement is Placement.COLUMN else None

    @property
    def row(self) -> TensorParallel | None:
        """The group of a row-parallel layer."""
        return self.tensor if self.placement is Placement.ROW else None


class _Needed:
    """Which gradients the backward pass that runs now is for.

    Autograd tells a function what it needs once, in forward. A zero-bubble pipeline runs backward
    twice, first for the inputs of a stage and later for its weights, and each product once.
    """

    inputs = True
    weights = True


@contextmanager
def backward_for(kind: str) -> Iterator[None]:
    """Around a backward pass: ``full``, or for ``input`` or ``weight`` gradients alone.

    One backward pass runs at a time in a process; autograd's own threads see the same.
    """
    _Needed.inputs, _Needed.weights = kind != "weight", kind != "input"
    try:
        yield
    finally:
        _Needed.inputs = _Needed.weights = True


class _LinearFunction(torch.autograd.Function):
    """y = scale x weight^T + bias. Saves x only when the weight is trained, and then its token
    shard alone (unless ``keep_gathered``): backward gathers it again."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, operand: Tensor, plan: Plan
    ) -> Tensor:
        flat = x.reshape(-1, x.shape[-1]).to(plan.matmul.dtype)
        ctx.plan = plan
        ctx.x_shape, ctx.x_dtype, ctx.rows = x.shape, x.dtype, len(flat)
        ctx.weight_dtype = weight.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        kept, flat = flat, _gathered(flat, plan)
        if plan.column is not None and plan.column.keep_gathered:
            kept = flat
        ctx.save_for_backward(kept if needs_weight else None, operand if needs_x else None)
        if plan.row is None:
            y = plan.matmul.fprop(flat, operand, bias, plan.scale)
        else:
            y = _reduced(plan.matmul.fprop(flat, operand, None, plan.scale), plan.row)
            y = y if bias is None else y.add_(bias.to(y.dtype))
        return y if plan.by_tokens else y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        plan: Plan = ctx.plan
        x, operand = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        needs_x = needs_x and _Needed.inputs
        needs_weight, needs_bias = needs_weight and _Needed.weights, needs_bias and _Needed.weights
        flat = grad.reshape(-1, grad.shape[-1]).to(plan.matmul.dtype)
        db = flat.sum(0, dtype=torch.float32).to(ctx.bias_dtype) if needs_bias else None
        if plan.row is not None and plan.row.sequence:
            flat = all_gather(flat, plan.row.group)[: ctx.rows]
        # The order of launches is what overlaps: the gather of x runs beside the first product,
        # the reduction of its result beside the second.
        x, gathering = _start_regather(x, plan) if needs_weight else (x, None)
        dx = dw = None
        reducing = None
        if needs_x:
            dx = plan.matmul.dgrad(flat, operand, plan.scale)
            dx, reducing = _start_reduction(dx, plan.column)
        if needs_weight:
            if gathering is not None:
                gathering.wait()
            dw = plan.matmul.wgrad(flat, x, scale=plan.scale).to(ctx.weight_dtype)
        if reducing is not None:
            reducing.wait()
        if dx is not None:
            dx = dx.to(ctx.x_dtype).view(ctx.x_shape)
        return dx, dw, db, None, None


def _gathered(flat: Tensor, plan: Plan) -> Tensor:
    """The tokens a product reads: all of them."""
    tensor = plan.column
    return flat if tensor is None or not tensor.sequence else all_gather(flat, tensor.group)


def _reduced(partial: Tensor, tensor: TensorParallel) -> Tensor:
    """The sum of a row-parallel layer's products: of this rank's tokens, or of all."""
    if not tensor.sequence:
        return all_reduce(partial, tensor.group)
    return reduce_scatter(pad_rows(partial, tensor.size), tensor.group)


def _start_regather(x: Tensor, plan: Plan) -> tuple[Tensor, dist.Work | None]:
    tensor = plan.column
    if tensor is None or not tensor.sequence or tensor.keep_gathered:
        return x, None
    return start_all_gather(x, tensor.group)


def _start_reduction(dx: Tensor, tensor: TensorParallel | None) -> tuple[Tensor, dist.Work | None]:
    if tensor is None:
        return dx, None
    start = start_reduce_scatter if tensor.sequence else start_all_reduce
    return start(dx.contiguous(), tensor.group)


def apply_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, operand: Tensor, plan: Plan
) -> Tensor:
    """``plan.scale`` times ``x`` [..., in] times ``weight`` [out, in] transposed, plus ``bias``
    [out], all local parts.

    operand: what ``matmul.operand`` made of the weight, possibly cached. Returns [..., out] in
    ``matmul.dtype``. Under sequence parallelism a column-parallel layer takes this rank's tokens
    [n / t, in] and returns all, [n, out]; a row-parallel one takes all tokens and returns this
    rank's, [n / t, out], n padded up. Gradients flow to x, weight and bias, each in its own
    dtype. A weight that needs no gradient costs no saved input.
    """
    run = _run if plan.tensor is None else _run_in_group
    return run(x, weight, bias, operand, plan)


def _run(x: Tensor, weight: Tensor, bias: Tensor | None, operand: Tensor, plan: Plan) -> Tensor:
    out: Tensor = _LinearFunction.apply(x, weight, bias, operand, plan)  # type: ignore[no-untyped-call]
    return out


# torch.compile cannot trace collectives that are waited for later.
_run_in_group = uncompiled(_run)
