"""Attention of a run of queries to a run of keys that starts elsewhere, whole or in parts.

A sequence that is split over ranks needs more than square causal attention: its queries stand
later than some of the keys (``window_attention``), and its softmax is taken in parts that are
merged by their log-sum-exp (``attention_partial``, ``merge_partial`` and the backward that
takes the log-sum-exp of the whole; Milakov and Gimelshein 2018, 1805.02867, section 3.1; Liu
et al. 2023, 2310.01889).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten

# The narrowest head that compiled flex_attention takes.
FLEX_MIN_HEAD = 16
# Queries whose scores the reference holds at a time.
QUERY_BLOCK = 256


@dataclass(frozen=True)
class Window:
    """Which of ``keys`` keys each of ``queries`` queries sees.

    Query i sees keys j <= offset + i, where ``offset`` is the position of the first query minus
    that of the first key. first: [b, queries] int32, the first key each query sees, counted from
    the first of these keys (negative: all; past the last: none), or None for all. block_mask: the
    same for flex_attention, where it is to run.
    """

    queries: int
    keys: int
    offset: int
    first: Tensor | None = None
    block_mask: Any = None

    @property
    def full(self) -> bool:
        """Whether every query sees every key."""
        return self.first is None and self.offset >= self.keys - 1

    def seen(self, device: torch.device, start: int = 0, stop: int | None = None) -> Tensor:
        """Bool mask [b or 1, 1, stop - start, keys] of queries ``start`` to ``stop``."""
        stop = self.queries if stop is None else stop
        key = torch.arange(self.keys, device=device)
        query = torch.arange(start, stop, device=device)
        seen = key <= query[:, None] + self.offset
        if self.first is None:
            return seen[None, None]
        return (seen & (key >= self.first[:, start:stop, None]))[:, None]


@cache
def _flex() -> tuple[Any, Any, Any]:
    """flex_attention and create_block_mask, compiled, and AuxRequest."""
    from torch.nn.attention import flex_attention as flex

    # Compiled, create_block_mask never holds the whole mask.
    compiled = torch.compile(flex.flex_attention), torch.compile(flex.create_block_mask)
    return *compiled, flex.AuxRequest


def make_window(queries: int, keys: int, offset: int, first: Tensor | None, d_head: int) -> Window:
    """The window, with what the kernels of its device need; ``first`` as in ``Window``."""
    if first is None or not first.is_cuda or d_head < FLEX_MIN_HEAD:
        return Window(queries, keys, offset, first)
    low = first
    # A tensor, not a number: compiled code is not made anew for each offset.
    last = torch.arange(offset, offset + queries, device=first.device)

    def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= last[q]) & (k >= low[b, q])

    mask = _flex()[1](sees, len(first), None, queries, keys, device=str(first.device))
    return Window(queries, keys, offset, first, mask)


def window_attention(q: Tensor, k: Tensor, v: Tensor, window: Window) -> Tensor:
    """softmax(q k^T / sqrt(d)) v over what ``window`` shows; every query must see a key.

    q: [b, h, queries, d]; k, v: [b, g, keys, d], g dividing h. Returns [b, h, queries, d].
    Differentiable.
    """
    grouped = q.shape[1] != k.shape[1]
    if window.block_mask is not None:
        out: Tensor = _flex()[0](q, k, v, block_mask=window.block_mask, enable_gqa=grouped)
        return out
    mask: Tensor | None = None
    aligned = window.first is None and window.offset == window.keys - window.queries
    if q.is_cuda and aligned:
        from torch.nn.attention.bias import causal_lower_right

        mask = causal_lower_right(window.queries, window.keys)
    elif not window.full:
        mask = window.seen(q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)


def _flash_takes(q: Tensor, window: Window) -> bool:
    """Whether FlashAttention runs this part: on CUDA in 16 bits, no documents, full or square."""
    square = window.offset == 0 and window.queries == window.keys
    return (
        q.is_cuda
        and q.dtype in (torch.bfloat16, torch.float16)
        and q.shape[-1] % 8 == 0
        and q.shape[-1] <= 256
        and window.first is None
        and (window.full or square)
    )


def attention_partial(q: Tensor, k: Tensor, v: Tensor, window: Window) -> tuple[Tensor, Tensor]:
    """Attention to some of the keys, and the log-sum-exp that merges it with the others.

    q: [b, h, queries, d]; k, v: [b, g, keys, d], g dividing h. Returns out [b, h, queries, d] in
    float32 or the dtype of q, and lse [b, h, queries] float32 in nats (float64 for float64). A
    query that sees no key has out 0 and lse -inf. No gradient: see ``attention_partial_backward``.
    """
    if _flash_takes(q, window):
        out, lse = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, not window.full)[:2]
        return out, lse
    if window.block_mask is not None:
        return _flex_partial(q, k, v, window)
    return attention_partial_reference(q, k, v, window)


def attention_partial_backward(
    grad: Tensor, qkv: tuple[Tensor, Tensor, Tensor], out: Tensor, lse: Tensor, window: Window
) -> tuple[Tensor, Tensor, Tensor]:
    """What this part of the keys contributes to the gradients of q, and those of its k and v.

    grad, out: [b, h, queries, d] and lse: [b, h, queries] of the *whole* softmax, merged over
    all parts. Returns dq, dk, dv in float32 or the dtype of q.
    """
    q, k, v = qkv
    if _flash_takes(q, window):
        # Random state of a dropout of 0: never read.
        state = [torch.zeros(n, dtype=torch.uint64, device=q.device) for n in ((2,), ())]
        sizes = (None, None, window.queries, window.keys)
        grads: tuple[Tensor, Tensor, Tensor]
        grads = aten._scaled_dot_product_flash_attention_backward(
            grad, q, k, v, out, lse, *sizes, 0.0, not window.full, *state
        )
        return grads
    if window.block_mask is not None:
        return backward_through(_flex_partial, grad, qkv, out, lse, window)
    return attention_partial_backward_reference(grad, qkv, out, lse, window)


def merge_partial(
    out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor
) -> tuple[Tensor, Tensor]:
    """Attention to two sets of keys from that to each of them.

    out, part: [b, h, queries, d]; lse, part_lse: [b, h, queries]. Returns both merged, in the
    dtype of ``lse``. A query that sees nothing of one set has the other's; of both, 0 and -inf.
    """
    total = torch.logaddexp(lse, part_lse)
    shift = total.masked_fill(total == -torch.inf, 0.0)
    old, new = (lse - shift).exp()[..., None], (part_lse - shift).exp()[..., None]
    return out * old + part * new, total


def _flex_partial(q: Tensor, k: Tensor, v: Tensor, window: Window) -> tuple[Tensor, Tensor]:
    attend, _, aux_request = _flex()
    grouped = q.shape[1] != k.shape[1]
    out, aux = attend(
        q,
        k,
        v,
        block_mask=window.block_mask,
        enable_gqa=grouped,
        return_aux=aux_request(lse=True),
    )
    return out, aux.lse


def backward_through(
    partial: Callable[[Tensor, Tensor, Tensor, Window], tuple[Tensor, Tensor]],
    grad: Tensor,
    qkv: tuple[Tensor, Tensor, Tensor],
    out: Tensor,
    lse: Tensor,
    window: Window,
) -> tuple[Tensor, Tensor, Tensor]:
    """``attention_partial_backward`` through the autograd of ``partial``, computed again.

    With w = exp(part_lse - lse), out = sum of w part over the parts; so part has the gradient
    w grad, and part_lse the gradient w (grad . part - grad . out).
    """
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in qkv]
        part, part_lse = partial(leaves[0], leaves[1], leaves[2], window)
    wide = lse.dtype
    weight = (part_lse.detach() - lse).exp()
    change = (grad.to(wide) * (part.detach().to(wide) - out.to(wide))).sum(-1)
    upstream = (weight[..., None] * grad.to(wide)).to(part.dtype)
    dq, dk, dv = torch.autograd.grad((part, part_lse), leaves, (upstream, weight * change))
    return dq, dk, dv


def _wide(x: Tensor) -> Tensor:
    """In float32, or float64 where it was."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _rows(x: Tensor, groups: int, start: int, stop: int) -> Tensor:
    """x [b, h, queries, ...] -> [b, g, h / g (stop - start), ...]: rows that share their keys."""
    return torch.unflatten(_wide(x[:, :, start:stop]), 1, (groups, -1)).flatten(2, 3)


def _heads(x: Tensor, queries: int) -> Tensor:
    """x [b, g, h / g queries, ...] -> [b, h, queries, ...]."""
    return torch.unflatten(x, 2, (-1, queries)).flatten(1, 2)


def _scores(q: Tensor, k: Tensor, window: Window, start: int, stop: int) -> Tensor:
    """Scaled scores [b, g, h / g (stop - start), keys], -inf where nothing is seen."""
    keys = _wide(k).transpose(-1, -2)
    scores: Tensor = _rows(q, k.shape[1], start, stop) @ keys * q.shape[-1] ** -0.5
    if window.full:
        return scores
    seen = window.seen(q.device, start, stop)[:, :, None]
    by_query = torch.unflatten(scores, 2, (-1, stop - start))
    return by_query.masked_fill(~seen, -torch.inf).flatten(2, 3)


def _blocks(queries: int) -> list[tuple[int, int]]:
    starts = range(0, queries, QUERY_BLOCK)
    return [(start, min(start + QUERY_BLOCK, queries)) for start in starts]


def attention_partial_reference(
    q: Tensor, k: Tensor, v: Tensor, window: Window
) -> tuple[Tensor, Tensor]:
    """``attention_partial`` in plain PyTorch: float32 products and sums, QUERY_BLOCK rows of
    scores at a time. Returns float32 (float64 for float64)."""
    outs, sums = [], []
    for start, stop in _blocks(window.queries):
        scores = _scores(q, k, window, start, stop)
        lse = scores.logsumexp(-1)
        shift = lse.masked_fill(lse == -torch.inf, 0.0)  # nothing seen: e^-inf, not e^NaN
        outs.append(_heads((scores - shift[..., None]).exp() @ _wide(v), stop - start))
        sums.append(_heads(lse, stop - start))
    return torch.cat(outs, 2), torch.cat(sums, 2)


def attention_partial_backward_reference(
    grad: Tensor, qkv: tuple[Tensor, Tensor, Tensor], out: Tensor, lse: Tensor, window: Window
) -> tuple[Tensor, Tensor, Tensor]:
    """``attention_partial_backward`` in plain PyTorch (FlashAttention-2, Dao 2023, 2307.08691,
    algorithm 2): float32 products and sums, returned in float32 (float64 for float64)."""
    q, k, v = qkv
    groups, wide_k, wide_v = k.shape[1], _wide(k), _wide(v)
    dk, dv = torch.zeros_like(wide_k), torch.zeros_like(wide_v)
    dqs = []
    for start, stop in _blocks(window.queries):
        rows, upstream, result, total = (_rows(x, groups, start, stop) for x in (q, grad, out, lse))
        p = (_scores(q, k, window, start, stop) - total[..., None]).exp()
        slope = upstream @ wide_v.transpose(-1, -2) - (upstream * result).sum(-1, keepdim=True)
        ds = p * slope * q.shape[-1] ** -0.5
        dqs.append(_heads(ds @ wide_k, stop - start))
        dk += ds.transpose(-1, -2) @ rows
        dv += p.transpose(-1, -2) @ upstream
    return torch.cat(dqs, 2), dk, dv
