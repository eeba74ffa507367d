"""The autograd function that runs every ``Matmul`` under every ``Placement``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial

from llmtrain.linear.matmul import Matmul
from llmtrain.linear.operand import (
    Operand,
    Packed,
    Reach,
    first_rows,
    from_parts,
    gather,
    parts_of,
    start_gather,
)
from llmtrain.linear.placement import Placement
from llmtrain.ops import Casts, Handoff
from llmtrain.parallel.collectives import (
    all_reduce,
    reduce_scatter,
    start_all_reduce,
    start_reduce_scatter,
)
from llmtrain.parallel.tensor import TensorParallel, pad_rows
from llmtrain.parallel.uncompiled import uncompiled


@dataclass(frozen=True)
class Plan:
    """How a product runs: number format, placement, the ranks that take part, and a constant
    ``scale`` that multiplies the product and both its gradients (but not the bias).

    freed: the weight is gathered for each product and freed between forward and backward
    (FSDP2), so that what it was packed into is not kept either, but made again.
    """

    matmul: Matmul
    placement: Placement = Placement.REPLICATED
    tensor: TensorParallel | None = None
    scale: float = 1.0
    freed: bool = False

    @property
    def by_tokens(self) -> bool:
        """Whether input or output is a token shard, which knows rows only."""
        split = self.placement is not Placement.REPLICATED
        return split and self.tensor is not None and self.tensor.sequence

    @property
    def token_shard(self) -> TensorParallel | None:
        """The group whose ranks each run their own tokens through the whole weight."""
        sequence = self.tensor is not None and self.tensor.sequence
        return self.tensor if sequence and self.placement is Placement.REPLICATED else None

    @property
    def column(self) -> TensorParallel | None:
        """The group of a column-parallel layer."""
        return self.tensor if self.placement is Placement.COLUMN else None

    @property
    def row(self) -> TensorParallel | None:
        """The group of a row-parallel layer."""
        return self.tensor if self.placement is Placement.ROW else None

    # Statistics of a whole operand are taken over the ranks that hold its parts, so that numbers
    # do not depend on the layout.

    @property
    def weight_reach(self) -> Reach:
        """The ranks that share the weight."""
        if self.tensor is None or self.placement is Placement.REPLICATED:
            return Reach()
        return Reach(self.tensor.group, self.tensor.group if self.row else None)

    @property
    def input_reach(self) -> Reach:
        """The ranks that share the input before it is gathered."""
        if self.row is not None:
            return Reach(self.row.group, self.row.group)
        if self.token_shard is not None:
            return Reach(self.token_shard.group)
        column = self.column
        return Reach(column.group if column is not None and column.sequence else None)

    @property
    def grad_reach(self) -> Reach:
        """The ranks that share the gradient of the output before it is gathered."""
        if self.column is not None:
            return Reach(self.column.group, self.column.group)
        if self.token_shard is not None:
            return Reach(self.token_shard.group)
        row = self.row
        return Reach(row.group if row is not None and row.sequence else None)

    @property
    def regathers(self) -> bool:
        """Whether backward gathers the input again."""
        column = self.column
        return column is not None and column.sequence and not column.keep_gathered


class Given(NamedTuple):
    """What is there for a layer already. casts: its input in e4m3; handoff: where its output's
    gradient will be in e5m2, both of its neighbours; parameter: what the weight is a part of, whose
    gradient may be there from earlier micro-batches. ``Linear`` says when."""

    casts: Casts | None = None
    handoff: Handoff | None = None
    parameter: Tensor | None = None


NOTHING = Given()


def _packed(casts: Casts) -> Packed:
    return Packed(casts.plain.flatten(0, -2), None, casts.turned)


class _Needed:
    """Which gradients the backward pass that runs now is for.

    Autograd tells a function what it needs once, in forward. A zero-bubble pipeline runs backward
    twice, first for the inputs of a stage and later for its weights, and each product once.
    """

    inputs = True
    weights = True
    # Whether weight gradients may be added to the parameters' own right in the product.
    summed = False


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


@contextmanager
def summing_gradients() -> Iterator[None]:
    """Around a backward pass whose gradients go to ``.grad`` and nowhere else: FP8 products add a
    weight gradient to an earlier micro-batch's themselves, and autograd sees none (nor do hooks on
    the parameter's gradient)."""
    _Needed.summed = True
    try:
        yield
    finally:
        _Needed.summed = False


def _earlier_sum(parameter: Tensor | None, weight: tuple[int, ...]) -> Tensor | None:
    """The float32 gradient that ``parameter`` has so far, this rank's part of shape ``weight``;
    None where there is none that a product can be added to."""
    found = None if parameter is None or not _Needed.summed else parameter.grad
    if isinstance(found, DTensor):
        partial = any(isinstance(place, Partial) for place in found.placements)
        found = None if partial else found._local_tensor
    if found is None or found.dtype != torch.float32 or found.shape != weight:
        return None
    return found if found.is_contiguous() else None


class _LinearFunction(torch.autograd.Function):
    """y = scale x weight^T + bias. Saves x only when the weight is trained, and then its token
    shard alone (unless ``keep_gathered``): backward gathers it again. What is saved and gathered
    is what the number format packed: one byte an element in FP8."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        plan: Plan,
        given: Given,
        *operand_parts: Tensor | None,
    ) -> Tensor:
        matmul, (values, *more) = plan.matmul, operand_parts
        operand = from_parts(matmul.packs, weight if values is None else values, *more)
        ctx.plan, ctx.handoff, ctx.parameter = plan, given.handoff, given.parameter
        ctx.x_shape, ctx.x_dtype, ctx.rows = x.shape, x.dtype, x.shape[:-1].numel()
        ctx.weight_dtype, ctx.weight_shape = weight.dtype, weight.shape
        ctx.bias_dtype = None if bias is None else bias.dtype
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        gathers = plan.column is not None and plan.column.sequence
        kept: Operand
        if given.casts is not None:
            kept = _packed(given.casts)
        else:
            flat = x.reshape(-1, x.shape[-1]).to(matmul.dtype)
            kept = matmul.pack_input(flat, plan.input_reach, needs_weight and not gathers)
        full = _gathered(kept, plan)
        if plan.column is not None and plan.column.keep_gathered:
            kept = full
        _save(ctx, kept if needs_weight else None, weight, operand if needs_x else None)
        if plan.row is None:
            y = matmul.fprop(full, operand, bias, plan.scale)
        else:
            y = _reduced(matmul.fprop(full, operand, None, plan.scale), plan.row)
            y = y if bias is None else y.add_(bias.to(y.dtype))
        return y if plan.by_tokens else y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        plan: Plan = ctx.plan
        matmul = plan.matmul
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        needs_x = needs_x and _Needed.inputs
        needs_weight, needs_bias = needs_weight and _Needed.weights, needs_bias and _Needed.weights
        kept, operand = _saved(ctx, needs_x, needs_weight)
        gathers = plan.row is not None and plan.row.sequence
        casts = None if ctx.handoff is None else ctx.handoff.take(grad)
        db = None
        if needs_bias or casts is None:
            flat = grad.reshape(-1, grad.shape[-1]).to(matmul.dtype)
            db = flat.sum(0, dtype=torch.float32).to(ctx.bias_dtype) if needs_bias else None
        packed: Operand
        if casts is not None:
            packed = _packed(casts)
        else:
            packed = matmul.pack_grad(flat, plan.grad_reach, needs_weight and not gathers)
        if gathers:
            assert plan.row is not None
            packed = first_rows(gather(packed, plan.row.group), ctx.rows)
        # The order of launches is what overlaps: the gather of x runs beside the first product,
        # the reduction of its result beside the second.
        gathering = None
        if kept is not None and plan.regathers:
            assert plan.column is not None
            kept, gathering = start_gather(kept, plan.column.group)
        dx = dw = None
        reducing = None
        if operand is not None:
            dx, reducing = _start_reduction(matmul.dgrad(packed, operand, plan.scale), plan.column)
        if kept is not None:
            if gathering is not None:
                gathering.wait()
            into = _earlier_sum(ctx.parameter, ctx.weight_shape)
            dw = matmul.wgrad(packed, kept, into, plan.scale).to(ctx.weight_dtype)
            dw = dw if into is None else None
        if reducing is not None:
            reducing.wait()
        if dx is not None:
            dx = dx.to(ctx.x_dtype).view(ctx.x_shape)
        return dx, dw, db, *(None,) * 5


def _save(ctx: Any, x: Operand | None, weight: Tensor, operand: Operand | None) -> None:
    """Keep what backward reads."""
    if isinstance(x, Packed) and x.turned is not None:
        x = Packed(None, x.scale, x.turned)
    # The parameter itself: FSDP2 frees its memory after forward and fills it for backward.
    again = isinstance(operand, Packed) and ctx.plan.freed
    parts = (weight, None, None) if again else parts_of(operand)
    ctx.again = again
    ctx.save_for_backward(*parts_of(x), *parts)


def _saved(ctx: Any, needs_x: bool, needs_weight: bool) -> tuple[Operand | None, Operand | None]:
    """Input and weight as ``wgrad`` and ``dgrad`` read them, None where they are not needed."""
    matmul: Matmul = ctx.plan.matmul
    saved = ctx.saved_tensors
    kept = from_parts(matmul.packs, *saved[:3]) if needs_weight else None
    if not needs_x:
        return kept, None
    if ctx.again:
        return kept, matmul.operand(saved[3].detach(), ctx.plan.weight_reach)
    return kept, from_parts(matmul.packs, *saved[3:])


def _gathered(x: Operand, plan: Plan) -> Operand:
    """The tokens a product reads: all of them."""
    tensor = plan.column
    return x if tensor is None or not tensor.sequence else gather(x, tensor.group)


def _reduced(partial: Tensor, tensor: TensorParallel) -> Tensor:
    """The sum of a row-parallel layer's products: of this rank's tokens, or of all."""
    if not tensor.sequence:
        return all_reduce(partial, tensor.group)
    return reduce_scatter(pad_rows(partial, tensor.size), tensor.group)


def _start_reduction(dx: Tensor, tensor: TensorParallel | None) -> tuple[Tensor, dist.Work | None]:
    if tensor is None:
        return dx, None
    start = start_reduce_scatter if tensor.sequence else start_all_reduce
    return start(dx.contiguous(), tensor.group)


def apply_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    operand: Operand,
    plan: Plan,
    given: Given = NOTHING,
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
    return run(x, weight, bias, operand, plan, given)


def _run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    operand: Operand,
    plan: Plan,
    given: Given,
) -> Tensor:
    values, *more = parts_of(operand)
    # torch.compile does not take the same tensor twice.
    values = None if values is weight else values
    out: Tensor = _LinearFunction.apply(x, weight, bias, plan, given, values, *more)  # type: ignore[no-untyped-call]
    return out


# torch.compile cannot trace collectives that are waited for later.
_run_in_group = uncompiled(_run)
