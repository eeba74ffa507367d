"""Attention of split sequences on a GPU: FlashAttention, flex_attention and the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmtrain.ops.window import (
    attention_partial,
    attention_partial_backward,
    make_window,
    merge_partial,
    window_attention,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DTYPES = [(torch.float32, 2e-5), (torch.bfloat16, 1e-2)]


def _documents(b: int, s: int) -> Tensor:
    begins = torch.rand(b, s, generator=torch.Generator().manual_seed(8)) < 0.02
    begins[:, 0] = True
    return torch.where(begins, torch.arange(s), 0).cummax(1).values.int()


def _inputs(b: int, h: int, g: int, s: int, d: int, dtype: torch.dtype) -> list[Tensor]:
    draw = torch.Generator().manual_seed(1)
    shapes = [(b, h, s, d), (b, g, s, d), (b, g, s, d), (b, h, s, d)]
    return [torch.randn(shape, generator=draw).to(dtype) for shape in shapes]


def _exact(q: Tensor, k: Tensor, v: Tensor, first: Tensor | None) -> Tensor:
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    position = torch.arange(q.shape[2])
    seen = (position <= position[:, None])[None, None]
    if first is not None:
        seen = seen & (position >= first[:, None, :, None])
    score = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    return score.masked_fill(~seen, -torch.inf).softmax(-1) @ v


def _error(ours: Tensor, exact: Tensor) -> float:
    ours, exact = ours.detach().cpu().double(), exact.detach()
    return float((ours - exact).norm() / exact.norm())


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_a_late_chunk_of_a_sequence(dtype: torch.dtype, tolerance: float, documents: bool) -> None:
    b, h, g, s, d, n = 2, 4, 2, 512, 64, 128
    *qkv, grad = _inputs(b, h, g, s, d, dtype)
    first = _documents(b, s) if documents else None
    high = [x.double().requires_grad_() for x in qkv]
    exact = _exact(*high, first)
    chunk = slice(2 * n, 3 * n)
    exact[:, :, chunk].backward(grad[:, :, chunk].double())
    low = [x.cuda() for x in (qkv[0][:, :, chunk], *(x[:, :, : 3 * n] for x in qkv[1:]))]
    for x in low:
        x.requires_grad_()
    own = None if first is None else first[:, chunk].contiguous().cuda()
    out = window_attention(*low, make_window(n, 3 * n, 2 * n, own, d))
    out.backward(grad[:, :, chunk].cuda())
    assert _error(out, exact[:, :, chunk]) < tolerance
    pieces = [chunk, slice(0, 3 * n), slice(0, 3 * n)]
    for ours, theirs, piece in zip(low, high, pieces, strict=True):
        assert ours.grad is not None and theirs.grad is not None
        assert _error(ours.grad, theirs.grad[:, :, piece]) < tolerance


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_the_parts_make_up_the_whole(dtype: torch.dtype, tolerance: float, documents: bool) -> None:
    b, h, g, s, d, n = 2, 4, 2, 384, 64, 128
    *qkv, grad = _inputs(b, h, g, s, d, dtype)
    first = _documents(b, s) if documents else None
    high = [x.double().requires_grad_() for x in qkv]
    exact = _exact(*high, first)
    exact.backward(grad.double())
    q, k, v, upstream = (x.cuda().chunk(s // n, 2) for x in (*qkv, grad))
    sums = [torch.zeros(x.shape, device="cuda") for x in qkv]
    parts = [x.chunk(s // n, 2) for x in sums]
    for i in range(s // n):
        own = None if first is None else first[:, i * n : (i + 1) * n].cuda()
        windows = [
            make_window(n, n, (i - j) * n, None if own is None else own - j * n, d)
            for j in range(i + 1)
        ]
        out, lse = attention_partial(q[i], k[i], v[i], windows[i])
        for j in range(i):
            out, lse = merge_partial(out, lse, *attention_partial(q[i], k[j], v[j], windows[j]))
        assert _error(out, exact[:, :, i * n : (i + 1) * n]) < tolerance
        out = out.to(dtype)
        for j in range(i + 1):
            qkv_j = (q[i], k[j], v[j])
            grads = attention_partial_backward(upstream[i], qkv_j, out, lse, windows[j])
            for into, at, value in zip(parts, (i, j, j), grads, strict=True):
                into[at].add_(value)
    for ours, theirs in zip(sums, high, strict=True):
        assert theirs.grad is not None
        assert _error(ours, theirs.grad) < tolerance
