"""Conjugate collectives: pairs of a collective and its adjoint as autograd functions.

Forward and backward of one function are adjoint linear maps over the group: for any x and g,
the sum over ranks of <f(x), g> equals the sum over ranks of <x, f'(g)>. All groups are passed
in; nothing is reduced in place, so a tensor that is not contiguous is safe. Rows are dim 0.

=====================  =====================  ============================
function               forward                backward
=====================  =====================  ============================
copy_to_parallel       identity               all-reduce
reduce_from_parallel   all-reduce             identity
sum_both_ways          all-reduce             all-reduce
scatter_rows           own rows               all-gather
gather_rows            all-gather             reduce-scatter
gather_rows_replicated all-gather             own rows
reduce_scatter_rows    reduce-scatter         all-gather
scatter_last           own columns            all-gather
gather_last            all-gather             own columns
all_to_all             all-to-all             all-to-all, splits swapped
=====================  =====================  ============================
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llmtrain.parallel.uncompiled import uncompiled

Group = dist.ProcessGroup

# The names of torch >= 2.13, where the old ones warn.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def all_reduce(x: Tensor, group: Group) -> Tensor:
    """A new tensor: the sum of ``x`` over the group."""
    out = x.contiguous().clone()
    dist.all_reduce(out, group=group)
    return out


def sum_together(tensors: Sequence[Tensor], group: Group) -> None:
    """Each of ``tensors`` becomes its sum over the group: one reduction a dtype, for which they
    are all copied once."""
    for dtype in dict.fromkeys(x.dtype for x in tensors):
        own = [x for x in tensors if x.dtype == dtype]
        flat = torch.cat([x.flatten() for x in own])
        dist.all_reduce(flat, group=group)
        for x, summed in zip(own, torch.split(flat, [x.numel() for x in own]), strict=True):
            x.copy_(summed.view_as(x))


def all_max(x: Tensor, group: Group) -> Tensor:
    """A new tensor: the largest ``x`` over the group, element by element."""
    out = x.contiguous().clone()
    dist.all_reduce(out, op=dist.ReduceOp.MAX, group=group)
    return out


def all_gather(x: Tensor, group: Group) -> Tensor:
    """Rows of all ranks, in rank order: [n, ...] -> [n size, ...]."""
    out, work = start_all_gather(x, group)
    work.wait()
    return out


def reduce_scatter(x: Tensor, group: Group) -> Tensor:
    """This rank's rows of the sum: [n size, ...] -> [n, ...]."""
    out, work = start_reduce_scatter(x, group)
    work.wait()
    return out


def start_all_gather(x: Tensor, group: Group) -> tuple[Tensor, dist.Work]:
    """``all_gather`` begun: the result is there after ``wait()``."""
    out = x.new_empty((len(x) * group.size(), *x.shape[1:]))
    work = _all_gather_single(out, x.contiguous(), group=group, async_op=True)
    return out, work


def start_reduce_scatter(x: Tensor, group: Group) -> tuple[Tensor, dist.Work]:
    """``reduce_scatter`` begun: the result is there after ``wait()``."""
    out = x.new_empty((len(x) // group.size(), *x.shape[1:]))
    work = _reduce_scatter_single(out, x.contiguous(), group=group, async_op=True)
    return out, work


def start_all_reduce(x: Tensor, group: Group) -> tuple[Tensor, dist.Work]:
    """``all_reduce`` begun in place of a contiguous ``x``; the result is ``x`` after ``wait()``."""
    assert x.is_contiguous()
    return x, dist.all_reduce(x, group=group, async_op=True)


def own_rows(x: Tensor, group: Group) -> Tensor:
    """This rank's equal part of the rows of ``x``."""
    share = len(x) // group.size()
    return x[group.rank() * share : (group.rank() + 1) * share]


def _gather_last(x: Tensor, group: Group) -> Tensor:
    parts = all_gather(x.unsqueeze(0), group)
    return torch.cat(parts.unbind(0), -1)


def _own_last(x: Tensor, group: Group) -> Tensor:
    share = x.shape[-1] // group.size()
    return x.narrow(-1, group.rank() * share, share).contiguous()


def _identity(x: Tensor, group: Group) -> Tensor:
    return x.view_as(x)


class _Conjugate(torch.autograd.Function):
    """forward(x, group), and its adjoint in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, forward: Any, backward: Any) -> Tensor:
        ctx.group, ctx.adjoint = group, backward
        out: Tensor = forward(x, group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.adjoint(grad, ctx.group), None, None, None


# torch.compile cannot trace collectives that are waited for later; the code around is compiled.
@uncompiled
def _apply(x: Tensor, group: Group, forward: Any, backward: Any) -> Tensor:
    out: Tensor = _Conjugate.apply(x, group, forward, backward)  # type: ignore[no-untyped-call]
    return out


def copy_to_parallel(x: Tensor, group: Group) -> Tensor:
    """x itself, going to weights that are split: its gradients are summed over the group."""
    return _apply(x, group, _identity, all_reduce)


def reduce_from_parallel(x: Tensor, group: Group) -> Tensor:
    """The sum of x over the group, going on to what every rank computes alike."""
    return _apply(x, group, all_reduce, _identity)


def sum_both_ways(x: Tensor, group: Group) -> Tensor:
    """The sum of x over the group, going on to what every rank computes differently."""
    return _apply(x, group, all_reduce, all_reduce)


def scatter_rows(x: Tensor, group: Group) -> Tensor:
    """This rank's rows of an x that every rank has."""
    return _apply(x, group, own_rows, all_gather)


def gather_rows(x: Tensor, group: Group) -> Tensor:
    """All rows, going to weights that are split: gradients are summed, each rank gets its rows."""
    return _apply(x, group, all_gather, reduce_scatter)


def gather_rows_replicated(x: Tensor, group: Group) -> Tensor:
    """All rows, going on to what every rank computes alike: gradients are not summed."""
    return _apply(x, group, all_gather, own_rows)


def reduce_scatter_rows(x: Tensor, group: Group) -> Tensor:
    """This rank's rows of the sum of x over the group."""
    return _apply(x, group, reduce_scatter, all_gather)


def scatter_last(x: Tensor, group: Group) -> Tensor:
    """This rank's part of the last dimension of an x that every rank has."""
    return _apply(x, group, _own_last, _gather_last)


def gather_last(x: Tensor, group: Group) -> Tensor:
    """The last dimension of all ranks, going on to what every rank computes alike."""
    return _apply(x, group, _gather_last, _own_last)


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, group: Group, send: list[int] | None, receive: list[int] | None
    ) -> Tensor:
        ctx.group, ctx.send, ctx.receive = group, send, receive
        return _exchange(x, group, send, receive)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchange(grad, ctx.group, ctx.receive, ctx.send), None, None, None


def _exchange(x: Tensor, group: Group, send: list[int] | None, receive: list[int] | None) -> Tensor:
    rows = len(x) if receive is None else sum(receive)
    out = x.new_empty((rows, *x.shape[1:]))
    dist.all_to_all_single(out, x.contiguous(), receive, send, group=group)
    return out


def all_to_all(
    x: Tensor,
    group: Group,
    send: Sequence[int] | None = None,
    receive: Sequence[int] | None = None,
) -> Tensor:
    """Rows exchanged: ``send[r]`` of ours go to rank r, ``receive[r]`` come from it.

    None: equal parts. Returns [sum(receive), ...] in rank order.
    """
    lists = (None if s is None else list(s) for s in (send, receive))
    out: Tensor = _AllToAll.apply(x, group, *lists)  # type: ignore[no-untyped-call]
    return out
