"""Causal attention of a sequence that is split over ranks (``parallel.context``).

Two exact methods. With b sequences of s tokens, g key/value heads of width d and items of e
bytes, each rank sends

=========  ==================================  =================================================
method     forward                             backward
=========  ==================================  =================================================
allgather  (c - 1) / c * 2 b s g d e           (c - 1) / c * 2 b s g d e
ring       (c - 1) / c * 2 b s g d e           (c - 1) / c * 2 b s g d (e + 4)
=========  ==================================  =================================================

allgather holds the keys and values of the whole sequence, also from forward to backward. ring
holds those of one more rank at a time and hides its messages behind the products; its gradients
of keys and values travel, and are added up, in float32 (8 bytes instead of 4 for float64).
Keys that no query of a chunk sees are left out of the products: later ones, and with documents
whole chunks before the first document in sight.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmtrain.ops.window import Window, make_window, window_attention
from llmtrain.parallel.context import ContextParallel, SplitSequence, gather_sequence
from llmtrain.parallel.ring import Pair, ring_attention
from llmtrain.parallel.uncompiled import uncompiled


@dataclass(frozen=True)
class ContextPlan:
    """What this rank's two chunks of queries see; made once per forward, for all its layers.

    gathered: per chunk the window into the gathered keys and where it begins (allgather).
    ring: per rank the pairs of its chunks with this rank's (ring). One of them is empty.
    """

    context: ContextParallel
    gathered: tuple[tuple[Window, int], ...] = ()
    ring: tuple[tuple[Pair, ...], ...] = ()


def plan_context(part: SplitSequence, tokens: int, d_head: int) -> ContextPlan:
    """The plan for ``tokens`` tokens per rank and sequence. Reads four numbers of ``first`` back
    from its device."""
    context, first = part.context, part.first
    n = tokens // 2
    assert tokens == 2 * n
    firsts: list[Tensor | None] = [None, None]
    reach = [(0, 0), (0, 0)]
    if first is not None:
        chunks = torch.unflatten(first, 1, (2, n))
        firsts = [chunks[:, i].contiguous() for i in (0, 1)]
        low, high = torch.stack((chunks.amin((0, 2)), chunks.amax((0, 2)))).tolist()
        reach = list(zip(low, high, strict=True))

    def window(i: int, begin: int, end: int) -> Window:
        """Chunk i of this rank against the keys of chunks ``begin`` to ``end``."""
        starts = firsts[i]
        if starts is not None:
            starts = None if reach[i][1] <= begin * n else starts - begin * n
        offset = (context.chunks[i] - begin) * n
        return make_window(n, (end - begin) * n, offset, starts, d_head)

    if context.method == "allgather":
        begins = [low // n for low, _ in reach]
        windows = (window(i, begins[i], context.chunks[i] + 1) for i in (0, 1))
        starts = (begin * n for begin in begins)
        return ContextPlan(context, gathered=tuple(zip(windows, starts, strict=True)))
    pairs = []
    for owner in range(context.size):
        theirs = ContextParallel(context.group, owner, context.size).chunks
        pairs.append(
            tuple(
                Pair(i, j, window(i, theirs[j], theirs[j] + 1))
                for i in (0, 1)
                for j in (0, 1)
                if reach[i][0] // n <= theirs[j] <= context.chunks[i]
            )
        )
    return ContextPlan(context, ring=tuple(pairs))


# torch.compile cannot trace messages that are waited for later.
@uncompiled
def context_attention(q: Tensor, k: Tensor, v: Tensor, plan: ContextPlan) -> Tensor:
    """``ops.causal_attention`` over the whole sequence for this rank's queries.

    q: [b, h, s / c, d]; k, v: [b, g, s / c, d], the tokens of ``split``. Returns
    [b, s / c, h, d]. Collective over the context group.
    """
    if plan.ring:
        return ring_attention(q, k, v, plan.context.group, plan.ring)
    keys, values = gather_sequence(torch.stack((k, v)), 3, plan.context.group).unbind(0)
    outs = []
    for part, (window, begin) in zip(q.chunk(2, 2), plan.gathered, strict=True):
        sees = slice(begin, begin + window.keys)
        outs.append(window_attention(part, keys[:, :, sees], values[:, :, sees], window))
    return torch.cat(outs, 2).transpose(1, 2)
