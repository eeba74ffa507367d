"""Attention to keys that start elsewhere, whole and in parts, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmtrain.ops import window as ops
from llmtrain.ops.window import (
    attention_partial,
    attention_partial_backward,
    attention_partial_reference,
    backward_through,
    make_window,
    merge_partial,
    window_attention,
)

DTYPES = [
    pytest.param(torch.float64, 1e-14, id="fp64"),
    pytest.param(torch.float32, 3e-6, id="fp32"),
    pytest.param(torch.bfloat16, 7e-3, id="bf16"),
]


def _randn(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _error(ours: Tensor, exact: Tensor) -> float:
    return float((ours.detach().double() - exact.detach()).norm() / exact.detach().norm())


def _exact(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """out and lse in float64 by the definition; seen: [b, queries, keys]."""
    q, k, v = (x.double() for x in (q, k, v))
    ratio = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(ratio, 1) for x in (k, v))
    score = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(~seen[:, None], -torch.inf)
    return score.softmax(-1).nan_to_num(0.0) @ v, score.logsumexp(-1)


def _case(documents: bool, queries: int, keys: int, offset: int, b: int) -> tuple:
    """first and the mask that follows from it, written out pair by pair."""
    draw = torch.Generator().manual_seed(4)
    first = None
    if documents:
        first = torch.randint(-3, keys, (b, queries), generator=draw).int()
        first = torch.minimum(first, torch.arange(queries).int() + offset)
    seen = torch.zeros(b, queries, keys, dtype=torch.bool)
    for i in range(b):
        for query in range(queries):
            low = 0 if first is None else max(int(first[i, query]), 0)
            seen[i, query, low : query + offset + 1] = True
    return first, seen


# (b, h, g, d, queries, keys, offset)
SHAPES = [(3, 4, 2, 8, 7, 19, 12), (1, 6, 1, 16, 13, 13, 0), (2, 3, 3, 32, 9, 5, 30)]


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_a_window(
    dtype: torch.dtype, tolerance: float, shape: tuple[int, ...], documents: bool
) -> None:
    b, h, g, d, queries, keys, offset = shape
    first, seen = _case(documents, queries, keys, offset, b)
    window = make_window(queries, keys, offset, first, d)
    low = [
        _randn(b, n, s, d, seed=i, dtype=dtype).requires_grad_()
        for i, (n, s) in enumerate(((h, queries), (g, keys), (g, keys)))
    ]
    high = [x.detach().double().requires_grad_() for x in low]
    exact, _ = _exact(*high, seen)
    out = window_attention(*low, window)
    upstream = _randn(*out.shape, seed=9, dtype=dtype)
    exact.backward(upstream.double())
    out.backward(upstream)
    assert out.shape == exact.shape
    for ours, theirs in [(out, exact), *((x.grad, y.grad) for x, y in zip(low, high, strict=True))]:
        assert _error(ours, theirs) < tolerance


def test_an_empty_row_is_told_from_a_full_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "QUERY_BLOCK", 4)
    q, k, v = (_randn(2, 2, 10, 8, seed=i, dtype=torch.float32) for i in range(3))
    first = torch.tensor([[0] * 10, [10] * 5 + [3] * 5]).int()  # 10: none of these keys
    window = make_window(10, 10, 100, first, 8)
    out, lse = attention_partial(q, k, v, window)
    exact, exact_lse = _exact(q, k, v, window.seen(q.device)[:, 0])
    torch.testing.assert_close(out, exact.float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse, exact_lse.float(), rtol=1e-5, atol=1e-6)
    assert (lse[1, :, :5] == -torch.inf).all() and (out[1, :, :5] == 0).all()
    assert lse[1, :, 5:].isfinite().all() and lse[0].isfinite().all()


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(("h", "g", "d"), [(4, 2, 8), (3, 1, 16)])
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_the_parts_make_up_the_whole(
    dtype: torch.dtype,
    tolerance: float,
    h: int,
    g: int,
    d: int,
    documents: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ops, "QUERY_BLOCK", 5)
    b, s = 2, 12
    first, seen = _case(documents, s, s, 0, b)
    low = [_randn(b, n, s, d, seed=i, dtype=dtype) for i, n in enumerate((h, g, g))]
    high = [x.double().requires_grad_() for x in low]
    exact, exact_lse = _exact(*high, seen)
    upstream = _randn(b, h, s, d, seed=9, dtype=dtype)
    exact.backward(upstream.double())

    q, k, v = low
    cuts = [slice(8, 12), slice(0, 3), slice(3, 8)]
    windows = [
        make_window(s, c.stop - c.start, -c.start, None if first is None else first - c.start, d)
        for c in cuts
    ]
    # Of the first part only the last queries see anything, of the others with documents few do.
    out, lse = attention_partial(q, k[:, :, cuts[0]], v[:, :, cuts[0]], windows[0])
    for c, w in zip(cuts[1:], windows[1:], strict=True):
        out, lse = merge_partial(out, lse, *attention_partial(q, k[:, :, c], v[:, :, c], w))
    assert _error(out, exact) < tolerance
    assert _error(lse, exact_lse) < tolerance

    close = {"rtol": tolerance, "atol": 3 * tolerance}
    dq = torch.zeros_like(exact)
    for c, w in zip(cuts, windows, strict=True):
        qkv = (q, k[:, :, c], v[:, :, c])
        grads = attention_partial_backward(upstream, qkv, out, lse, w)
        again = backward_through(attention_partial_reference, upstream, qkv, out, lse, w)
        for ours, other in zip(grads, again, strict=True):
            torch.testing.assert_close(other.double(), ours.double(), **close)
        dq += grads[0]
        assert _error(grads[1], high[1].grad[:, :, c]) < tolerance
        assert _error(grads[2], high[2].grad[:, :, c]) < tolerance
    assert _error(dq, high[0].grad) < tolerance
