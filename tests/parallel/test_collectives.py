"""Conjugate collectives against what they mean, with random upstream gradients, in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from helpers.ranks import run_ranks
from torch import Tensor

from llmtrain.parallel import collectives

ROWS, COLUMNS = 3, 5


def _draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _odd_strides(x: Tensor) -> Tensor:
    """The same values, not contiguous: a reduction in place of a copy would be lost."""
    return x.t().contiguous().t()


def _cat(parts: list[Tensor], dim: int = 0) -> Tensor:
    return torch.cat(parts, dim)


def _own(x: Tensor, rank: int, world: int, dim: int) -> Tensor:
    return x.chunk(world, dim)[rank]


# From all ranks' inputs (or upstream gradients), the rank and the world to the rank's output (or
# gradient).
Meaning = Callable[[list[Tensor], int, int], Tensor]
# name: is the input that of all ranks together? the output? forward, backward
CASES: dict[str, tuple[bool, bool, Meaning, Meaning]] = {
    "copy_to_parallel": (False, False, lambda x, r, w: x[r], lambda g, r, w: sum(g)),
    "reduce_from_parallel": (False, False, lambda x, r, w: sum(x), lambda g, r, w: g[r]),
    "sum_both_ways": (False, False, lambda x, r, w: sum(x), lambda g, r, w: sum(g)),
    "scatter_rows": (True, False, lambda x, r, w: _own(x[r], r, w, 0), lambda g, r, w: _cat(g)),
    "gather_rows": (False, True, lambda x, r, w: _cat(x), lambda g, r, w: _own(sum(g), r, w, 0)),
    "gather_rows_replicated": (
        False,
        True,
        lambda x, r, w: _cat(x),
        lambda g, r, w: _own(g[r], r, w, 0),
    ),
    "reduce_scatter_rows": (
        True,
        False,
        lambda x, r, w: _own(sum(x), r, w, 0),
        lambda g, r, w: _cat(g),
    ),
    "scatter_last": (
        True,
        False,
        lambda x, r, w: _own(x[r], r, w, -1),
        lambda g, r, w: _cat(g, -1),
    ),
    "gather_last": (
        False,
        True,
        lambda x, r, w: _cat(x, -1),
        lambda g, r, w: _own(g[r], r, w, -1),
    ),
}


def _shape(name: str, wide: bool, world: int) -> tuple[int, int]:
    factor = world if wide else 1
    last = name.endswith("last")
    return (ROWS * (1 if last else factor), COLUMNS * (factor if last else 1))


@pytest.mark.parametrize("world", [2, 4])
def test_forward_and_backward(world: int) -> None:
    def body(rank: int) -> dict[str, tuple[Tensor, Tensor]]:
        out = {}
        for i, (name, (wide_in, wide_out, _, _)) in enumerate(CASES.items()):
            x = _odd_strides(_draw(100 * i + rank, *_shape(name, wide_in, world)))
            x.requires_grad_()
            upstream = _odd_strides(_draw(100 * i + 50 + rank, *_shape(name, wide_out, world)))
            y = getattr(collectives, name)(x, dist.group.WORLD)
            y.backward(upstream)
            assert x.grad is not None
            out[name] = (y.detach(), x.grad)
        return out

    results = run_ranks(world, body)
    for i, (name, (wide_in, wide_out, forward, backward)) in enumerate(CASES.items()):
        xs = [_draw(100 * i + r, *_shape(name, wide_in, world)) for r in range(world)]
        gs = [_draw(100 * i + 50 + r, *_shape(name, wide_out, world)) for r in range(world)]
        for rank in range(world):
            y, grad = results[rank][name]
            torch.testing.assert_close(y, forward(xs, rank, world), msg=f"{name} forward")
            torch.testing.assert_close(grad, backward(gs, rank, world), msg=f"{name} backward")


@pytest.mark.parametrize("world", [2, 4])
def test_pairs_are_adjoint(world: int) -> None:
    """The sum over ranks of <f(x), g> is that of <x, f'(g)>. The other functions take or give
    what is the same on every rank by its meaning, so their sums count it several times."""

    def body(rank: int) -> list[tuple[str, float, float]]:
        out = []
        for i, name in enumerate(("sum_both_ways", "gather_rows", "reduce_scatter_rows")):
            wide_in, wide_out, _, _ = CASES[name]
            x = _draw(7 * i + rank, *_shape(name, wide_in, world)).requires_grad_()
            g = _draw(7 * i + 70 + rank, *_shape(name, wide_out, world))
            y = getattr(collectives, name)(x, dist.group.WORLD)
            y.backward(g)
            assert x.grad is not None
            out.append((name, float((y.detach() * g).sum()), float((x.detach() * x.grad).sum())))
        return out

    results = run_ranks(world, body)
    for parts in zip(*results, strict=True):
        left, right = sum(p[1] for p in parts), sum(p[2] for p in parts)
        assert left == pytest.approx(right, rel=1e-12), parts[0][0]


@pytest.mark.parametrize("world", [2, 4])
def test_all_to_all(world: int) -> None:
    # Rank r sends r + s + 1 rows to rank s.
    def body(rank: int) -> tuple[Tensor, Tensor]:
        send = [rank + s + 1 for s in range(world)]
        x = _draw(rank, sum(send), COLUMNS).requires_grad_()
        y = collectives.all_to_all(x, dist.group.WORLD, send, send)
        y.backward(_draw(20 + rank, *y.shape))
        assert x.grad is not None
        equal = collectives.all_to_all(torch.full((2 * world,), rank), dist.group.WORLD)
        assert equal.tolist() == [r for r in range(world) for _ in range(2)]
        return y.detach(), x.grad

    counts = [[r + s + 1 for s in range(world)] for r in range(world)]
    xs = [_draw(r, sum(counts[r]), COLUMNS).split(counts[r]) for r in range(world)]
    gs = [_draw(20 + r, sum(counts[r]), COLUMNS).split(counts[r]) for r in range(world)]
    for rank, (y, grad) in enumerate(run_ranks(world, body)):
        torch.testing.assert_close(y, torch.cat([xs[s][rank] for s in range(world)]))
        torch.testing.assert_close(grad, torch.cat([gs[s][rank] for s in range(world)]))


def test_sums_together_are_one_reduction_a_dtype() -> None:
    """Whole numbers, so that the order of additions is the same to the bit."""
    shapes = [((3, 5), torch.float32), ((7,), torch.bfloat16), ((2, 4, 3), torch.float32)]

    def own(rank: int) -> list[Tensor]:
        draw = torch.Generator().manual_seed(rank)
        return [torch.randint(-9, 9, s, generator=draw).to(dtype) for s, dtype in shapes]

    def body(rank: int) -> tuple[list[Tensor], int]:
        tensors, calls = own(rank), []
        tensors[0] = _odd_strides(tensors[0])
        real = dist.all_reduce
        dist.all_reduce = lambda x, **rest: calls.append(x.dtype) or real(x, **rest)
        collectives.sum_together(tensors, dist.group.WORLD)
        collectives.sum_together([], dist.group.WORLD)
        return tensors, len(calls)

    expected = [sum(parts) for parts in zip(*map(own, range(3)), strict=True)]
    for tensors, calls in run_ranks(3, body):
        assert calls == 2
        assert all(map(torch.equal, tensors, expected))
