"""Attention of a split sequence against attention of the whole, in both methods."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.ranks import run_ranks
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from llmtrain.parallel.context import ContextParallel, SplitSequence, local_positions, split
from llmtrain.parallel.context_attention import context_attention, plan_context

METHODS = ["allgather", "ring"]


def _documents(kind: str, b: int, s: int, chunk: int) -> Tensor | None:
    """First key of each query, [b, s] int32."""
    if kind == "none":
        return None
    begins = torch.zeros(b, s, dtype=torch.bool)
    if kind == "random":  # they straddle the borders of chunks
        begins = torch.rand(b, s, generator=torch.Generator().manual_seed(8)) < 0.1
    elif kind == "chunks":  # they begin with the chunks: everything else is out of sight
        begins[:, ::chunk] = True
    elif kind == "tokens":  # one token each, in the first sequence
        begins[0] = True
    elif kind == "late":  # one long one from the middle of a chunk on
        begins[:, chunk + chunk // 2] = True
    begins[:, 0] = True
    return torch.where(begins, torch.arange(s), 0).cummax(1).values.int()


def _exact(q: Tensor, k: Tensor, v: Tensor, first: Tensor | None) -> Tensor:
    """Attention of the whole sequence in float64, [b, s, h, d]."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    position = torch.arange(q.shape[2])
    seen = (position <= position[:, None])[None, None]
    if first is not None:
        seen = seen & (position >= first[:, None, :, None])
    score = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    return (score.masked_fill(~seen, -torch.inf).softmax(-1) @ v).transpose(1, 2)


def _attend(
    rank: int, size: int, method: str, shape: tuple[int, ...], kind: str, dtype: torch.dtype
) -> list[float]:
    """Relative errors of out, dq, dk, dv of this rank's part against the whole."""
    group = dist.group.WORLD
    assert group is not None
    b, s, h, g, d = shape
    draw = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(b, n, s, d, generator=draw).to(dtype) for n in (h, g, g))
    upstream = torch.randn(b, s, h, d, generator=draw).to(dtype)
    first = _documents(kind, b, s, s // (2 * size))
    whole = [x.to(torch.float64, copy=True).requires_grad_() for x in (q, k, v)]
    exact = _exact(*whole, first)
    exact.backward(upstream.double())

    context = ContextParallel(group, rank, size, method)
    local = [split(x, 2, rank, size).requires_grad_() for x in (q, k, v)]
    starts = None if first is None else split(first, 1, rank, size)
    out = context_attention(*local, plan_context(SplitSequence(context, starts), s // size, d))
    out.backward(split(upstream, 1, rank, size))
    pairs = [(out.detach(), split(exact.detach(), 1, rank, size))]
    for ours, theirs in zip(local, whole, strict=True):
        assert ours.grad is not None and theirs.grad is not None and ours.grad.dtype == dtype
        pairs.append((ours.grad, split(theirs.grad, 2, rank, size)))
    assert all(x.shape == y.shape for x, y in pairs)
    # Documents of one token have no gradient in q and k: an absolute error there.
    return [float((x.double() - y).norm() / y.norm().clamp(min=1.0)) for x, y in pairs]


# (b, s, h, g, d)
SHAPES = {
    2: [(1, 12, 4, 2, 8), (3, 28, 3, 1, 16), (2, 4, 2, 2, 8)],
    3: [(3, 30, 4, 2, 16), (1, 18, 6, 1, 8)],
    4: [(1, 48, 4, 4, 8), (3, 24, 4, 2, 16)],
}


@pytest.mark.dist
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-14), (torch.float32, 2e-6), (torch.bfloat16, 7e-3)],
    ids=["fp64", "fp32", "bf16"],
)
def test_a_split_sequence_attends_like_a_whole_one(
    size: int, method: str, dtype: torch.dtype, tolerance: float
) -> None:
    cases = [
        (shape, kind)
        for shape in SHAPES[size]
        for kind in ("none", "random", "chunks", "tokens", "late")
    ]

    def body(rank: int) -> list[list[float]]:
        return [_attend(rank, size, method, shape, kind, dtype) for shape, kind in cases]

    for rank, errors in enumerate(run_ranks(size, body)):
        for case, found in zip(cases, errors, strict=True):
            assert max(found) < tolerance, (rank, case, found)


class _Sent(TorchDispatchMode):
    """Counts the bytes that this rank sends to others, by kind of collective."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.bytes = size, Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func._schema.name.removeprefix("c10d::")
            others = self.size - 1
            if name == "_allgather_base_":  # (output, input): our part to each of the others
                self.bytes[name] += others * args[1].nbytes
            elif name == "alltoall_base_":  # (output, input): all but our own part
                self.bytes[name] += args[1].nbytes * others // self.size
            elif name == "send":
                self.bytes[name] += sum(x.nbytes for x in args[0])
            else:
                assert name == "recv_", f"a collective that nobody counts: {name}"
        return func(*args, **(kwargs or {}))


@pytest.mark.dist
@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("method", METHODS)
def test_what_is_sent_follows_the_formula(size: int, method: str) -> None:
    b, h, g, d, s = 3, 4, 2, 8, 24

    def body(rank: int) -> list[Counter[str]]:
        group = dist.group.WORLD
        assert group is not None
        context = ContextParallel(group, rank, size, method)
        q, k, v = (
            torch.randn(b, n, s // size, d, dtype=torch.bfloat16).requires_grad_()
            for n in (h, g, g)
        )
        plan = plan_context(SplitSequence(context), s // size, d)
        with _Sent(size) as forward:
            out = context_attention(q, k, v, plan)
        with _Sent(size) as backward:
            out.sum().backward()
        return [forward.bytes, backward.bytes]

    gathered = (size - 1) * 2 * b * s * g * d * 2 // size  # in bfloat16
    if method == "allgather":
        expected = [{"_allgather_base_": gathered}, {"alltoall_base_": gathered}]
    else:
        expected = [{"send": gathered}, {"send": gathered * (2 + 4) // 2}]
    for sent in run_ranks(size, body):
        assert sent == expected


@pytest.mark.parametrize("method", METHODS)
def test_chunks_out_of_sight_are_left_out(method: str) -> None:
    size, n = 3, 4
    position = local_positions(2 * size * n, 1, size)
    chunks = [1, 4]

    def pairs(first: Tensor | None) -> set[tuple[int, int]]:
        """(chunk of queries, chunk of keys) that rank 1 computes."""
        # The group is only handed on.
        context = ContextParallel(None, 1, size, method)  # type: ignore[arg-type]
        plan = plan_context(SplitSequence(context, first), 2 * n, 8)
        if method == "ring":
            return {
                (chunks[p.query], ContextParallel(None, owner, size).chunks[p.key])  # type: ignore[arg-type]
                for owner, found in enumerate(plan.ring)
                for p in found
            }
        found = set()
        for chunk, (window, begin) in zip(chunks, plan.gathered, strict=True):
            assert begin + window.keys == (chunk + 1) * n
            found |= {(chunk, begin // n + i) for i in range(window.keys // n)}
        return found

    late = {(4, i) for i in range(5)}
    assert pairs(None) == {(1, 0), (1, 1)} | late
    assert pairs(torch.zeros(2, 2 * n).int()) == {(1, 0), (1, 1)} | late
    own = torch.stack((position // n * n, position // n * n)).int()
    assert pairs(own) == {(1, 1), (4, 4)}
    # One sequence of the two looks back to the middle of chunk 2.
    own[1, n:] = 2 * n + 1
    assert pairs(own) == {(1, 1), (4, 2), (4, 3), (4, 4)}
