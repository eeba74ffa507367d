"""Ring attention (Liu et al. 2023, 2310.01889): keys and values pass from rank to rank.

In step t rank r attends to what rank r - t holds, while that travels on to rank r + 1. Partial
softmaxes are merged by their log-sum-exp. Backward passes keys and values around once more, and
with them, from the second rank on, the sum of their gradients, which ends where it belongs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llmtrain.ops.window import (
    Window,
    attention_partial,
    attention_partial_backward,
    merge_partial,
)

Pairs = tuple[tuple["Pair", ...], ...]


@dataclass(frozen=True)
class Pair:
    """Chunk ``query`` of this rank (0 or 1) against chunk ``key`` (0 or 1) of another."""

    query: int
    key: int
    window: Window


@dataclass(frozen=True)
class _Passing:
    """A tensor on its way to the next rank, and the one coming from the rank before."""

    received: Tensor
    works: list[dist.Work]

    def wait(self) -> Tensor:
        for work in self.works:
            work.wait()
        return self.received


def _start_passing(x: Tensor, group: dist.ProcessGroup) -> _Passing:
    """Begin to send x to the next rank of the group and to receive the previous one's."""
    rank, size = group.rank(), group.size()
    after, before = (dist.get_global_rank(group, (rank + step) % size) for step in (1, -1))
    received = torch.empty_like(x)
    messages = [
        dist.P2POp(dist.isend, x, after, group),
        dist.P2POp(dist.irecv, received, before, group),
    ]
    return _Passing(received, dist.batch_isend_irecv(messages))


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, group: dist.ProcessGroup, pairs: Pairs
    ) -> Tensor:
        rank, size = group.rank(), group.size()
        queries = q.chunk(2, 2)
        merged: list[tuple[Tensor, Tensor] | None] = [None, None]
        held = torch.stack((k, v))
        for step in range(size):
            passing = _start_passing(held, group) if step < size - 1 else None
            for pair in pairs[(rank - step) % size]:
                keys, values = held.chunk(2, 3)[pair.key].unbind(0)
                part = attention_partial(queries[pair.query], keys, values, pair.window)
                before = merged[pair.query]
                merged[pair.query] = part if before is None else merge_partial(*before, *part)
            held = held if passing is None else passing.wait()
        outs, sums = zip(*(m for m in merged if m is not None), strict=True)
        out = torch.cat([x.to(q.dtype) for x in outs], 2)
        ctx.save_for_backward(q, k, v, out, torch.cat(sums, 2))
        ctx.group, ctx.pairs = group, pairs
        return out.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, out, lse = ctx.saved_tensors
        group, rank, size = ctx.group, ctx.group.rank(), ctx.group.size()
        # By chunks of queries: what each partial backward reads.
        chunks = list(
            zip(*(x.chunk(2, 2) for x in (q, grad.transpose(1, 2), out, lse)), strict=True)
        )
        dq = torch.zeros_like(q, dtype=lse.dtype)
        held = torch.stack((k, v))
        own = torch.zeros_like(held, dtype=lse.dtype)
        passing_sums: _Passing | None = None
        for step in range(size):
            passing = _start_passing(held, group) if step < size - 1 else None
            sums = own if step == 0 else torch.zeros_like(own)
            for pair in ctx.pairs[(rank - step) % size]:
                queries, upstream, result, total = chunks[pair.query]
                keys, values = held.chunk(2, 3)[pair.key].unbind(0)
                grads = attention_partial_backward(
                    upstream, (queries, keys, values), result, total, pair.window
                )
                dq.chunk(2, 2)[pair.query].add_(grads[0])
                for into, part in zip(sums.chunk(2, 3)[pair.key].unbind(0), grads[1:], strict=True):
                    into.add_(part)
            if step > 0:
                if passing_sums is not None:
                    sums += passing_sums.wait()
                passing_sums = _start_passing(sums, group)
            held = held if passing is None else passing.wait()
        if passing_sums is not None:
            own += passing_sums.wait()
        dk, dv = own.to(k.dtype).unbind(0)
        return dq.to(q.dtype), dk, dv, None, None


def ring_attention(
    q: Tensor, k: Tensor, v: Tensor, group: dist.ProcessGroup, pairs: Pairs
) -> Tensor:
    """Attention of this rank's queries to the keys of all ranks of ``group``.

    q: [b, h, s / c, d]; k, v: [b, g, s / c, d], two chunks each. pairs: for each rank of the
    group, what of its chunks these queries see. Returns [b, s / c, h, d]. Collective.
    """
    out: Tensor = _Ring.apply(q, k, v, group, pairs)  # type: ignore[no-untyped-call]
    return out
