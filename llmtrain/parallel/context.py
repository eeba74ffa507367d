"""Context parallelism: the tokens of every sequence are shared among the ranks of a group.

A sequence of s tokens is cut into 2c chunks for c ranks, and rank r holds chunks r and
2c - 1 - r. Under a causal mask the work of chunk i grows with i, so the work of the two chunks
of any rank adds up to the same (the balanced split of Llama 3, 2407.21783, section 3.3.2, known
as zigzag). Everything per token stays as it is on a part of the tokens; only attention looks
at other ranks' keys and values (``parallel.context_attention``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llmtrain.data.batch import Batch
from llmtrain.ops import first_of_document
from llmtrain.parallel.collectives import all_gather, all_to_all


@dataclass(frozen=True)
class ContextParallel:
    """The ranks that share a sequence and how their queries reach the others' keys.

    rank, size: place in ``group``. method: ``parallel.context_method``, allgather or ring.
    """

    group: dist.ProcessGroup
    rank: int
    size: int
    method: str = "allgather"

    @property
    def chunks(self) -> tuple[int, int]:
        """The two chunks of 2 ``size`` that this rank holds, in the order it holds them."""
        return chunks_of(self.rank, self.size)

    def positions(self, seq_len: int) -> Tensor:
        """Where this rank's tokens stand in the whole sequence, see ``local_positions``."""
        return local_positions(seq_len, self.rank, self.size)


@dataclass(frozen=True)
class SplitSequence:
    """What a forward over a part of each sequence must know: the ranks that hold the rest, and
    ``first`` of its ``Batch``, [b, s / size] int32, or None where a token sees all before it."""

    context: ContextParallel
    first: Tensor | None = None


def chunks_of(rank: int, size: int) -> tuple[int, int]:
    """The chunks of ``rank``: an early one and a late one."""
    return rank, 2 * size - 1 - rank


def local_positions(seq_len: int, rank: int, size: int) -> Tensor:
    """Global positions of the tokens of ``rank``, int64 [seq_len / size], in the order it holds
    them. seq_len: a multiple of 2 ``size``."""
    return split(torch.arange(seq_len), 0, rank, size)


def split(x: Tensor, dim: int, rank: int, size: int) -> Tensor:
    """The part of ``rank`` along ``dim``, whose length is a multiple of 2 ``size``; a copy."""
    length = x.shape[dim]
    assert length % (2 * size) == 0, f"{length} tokens cannot be cut into {2 * size} chunks"
    n = length // (2 * size)
    return torch.cat([x.narrow(dim, chunk * n, n) for chunk in chunks_of(rank, size)], dim)


def join(parts: Sequence[Tensor], dim: int) -> Tensor:
    """The whole again from the parts of all ranks in rank order; the inverse of ``split``."""
    halves = [part.chunk(2, dim) for part in parts]
    return torch.cat([early for early, _ in halves] + [late for _, late in reversed(halves)], dim)


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return join(all_gather(x[None], group).unbind(0), dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        size = ctx.group.size()
        parts = torch.stack([split(grad, ctx.dim, rank, size) for rank in range(size)])
        # Added here and not on the way: the wire carries the dtype of x, and torch adds in float32.
        return all_to_all(parts, ctx.group).sum(0), None, None


def gather_sequence(x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    """The whole sequence in global order from every rank's part, along ``dim``.

    Forward gathers; backward sums the gradients over the group and gives each rank its part
    (a reduce-scatter that adds in float32). Each moves (c - 1) / c of the gathered bytes out of
    every rank.
    """
    out: Tensor = _GatherSequence.apply(x, dim, group)  # type: ignore[no-untyped-call]
    return out


def split_batch(batch: Batch, rank: int, size: int, document_mask: bool) -> Batch:
    """The tokens of ``rank`` of every sequence, [b, s / size] per field.

    ``positions`` stay those of the whole sequence and must reach the model, which cannot count
    them from 0; so does, with document_mask, ``first``. source_ids and sample_ids belong to
    sequences, which all ranks of the group share.
    """
    per_token = ("tokens", "targets", "weights", "doc_ids", "positions")
    parts = {name: split(getattr(batch, name), 1, rank, size) for name in per_token}
    if document_mask:
        parts["first"] = split(first_of_document(batch.doc_ids), 1, rank, size)
    return replace(batch, **parts)
