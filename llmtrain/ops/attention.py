"""Causal attention, plain or confined to documents."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llmtrain.ops.native import attention_usable, kernels


def first_of_document(doc_ids: Tensor) -> Tensor:
    """Position at which the document of each position begins.

    doc_ids: [b, s] integers; a document is a run of equal numbers. Returns [b, s] int32.
    """
    position = torch.arange(doc_ids.shape[1], device=doc_ids.device)
    begins = torch.ones_like(doc_ids, dtype=torch.bool)
    begins[:, 1:] = doc_ids[:, 1:] != doc_ids[:, :-1]
    return torch.where(begins, position, 0).cummax(1).values.to(torch.int32)


def visible(first: Tensor) -> Tensor:
    """Bool mask [b, 1, s, s], True where query i sees key j: first[b, i] <= j <= i."""
    key = torch.arange(first.shape[1], device=first.device)
    return ((key >= first[:, :, None]) & (key <= key[:, None]))[:, None]


def attention_reference(q: Tensor, k: Tensor, v: Tensor, first: Tensor | None) -> Tensor:
    """``causal_attention`` through scaled_dot_product_attention."""
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=None if first is None else visible(first),
        is_causal=first is None,
        enable_gqa=q.shape[1] != k.shape[1],
    ).transpose(1, 2)


class _Native(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, first: Tensor | None) -> Tensor:
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        single = q.dtype == torch.float32
        run = kernels().attention_f32 if single else kernels().attention
        out, lse = run(q, k, v, first, q.shape[-1] ** -0.5)
        ctx.save_for_backward(q, k, v, out, lse, first)
        return out  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, out, lse, first = ctx.saved_tensors
        grad = grad if grad.stride(-1) == 1 else grad.contiguous()
        scale = q.shape[-1] ** -0.5
        single = q.dtype == torch.float32
        run = kernels().attention_f32_backward if single else kernels().attention_backward
        dq, dk, dv = run(grad, q, k, v, out, lse, first, scale)
        return dq, dk, dv, None


def causal_attention(q: Tensor, k: Tensor, v: Tensor, first: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v over earlier positions, with float32 scores.

    q: [b, h, s, d]; k, v: [b, g, s, d], g dividing h: query head i reads key head i g / h.
    first: [b, s] int32, the first key each query sees (a document's first position), None for 0.
    Returns [b, s, h, d].
    """
    if not attention_usable(q):
        return attention_reference(q, k, v, first)
    out: Tensor = _Native.apply(q, k, v, first)  # type: ignore[no-untyped-call]
    return out


def cached_attention(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, *, root: bool = False
) -> Tensor:
    """Attention of few queries to the keys that ``seen`` [b, s, t] (bool) shows each of them.

    q: [b, h, s, d]; k, v: [b, g, t, d], g dividing h. root: as in ``sqrt_attention``. Returns
    [b, s, h, d]. In plain PyTorch, without gradients of its own.
    """
    b, h, s, d = q.shape
    groups = k.shape[1]
    # The heads of a group are more queries of its one key head: k and v are not repeated.
    many = q.reshape(b, groups, h // groups * s, d)
    mask = seen[:, None].expand(b, h // groups, s, -1).reshape(b, 1, h // groups * s, -1)
    if root:
        out = _root_of_softmax(many, k, v, mask)
    else:
        out = F.scaled_dot_product_attention(many, k, v, attn_mask=mask)
    return out.reshape(b, h, s, d).transpose(1, 2)


def sqrt_attention(q: Tensor, k: Tensor, v: Tensor, first: Tensor | None = None) -> Tensor:
    """sqrt(softmax(q k^T / sqrt(d))) v over earlier positions (2502.05967, section 2.1).

    The squares of the weights sum to 1, so that independent values of unit variance keep it.
    Arguments and result as for ``causal_attention``. In plain PyTorch with all scores
    [b, h, s, s] in float32.
    """
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    if first is None:
        s = q.shape[2]
        seen = torch.ones(s, s, dtype=torch.bool, device=q.device).tril()
    else:
        seen = visible(first)
    return _root_of_softmax(q, k, v, seen).transpose(1, 2)


def _root_of_softmax(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """[b, h, s, d] of q [b, h, s, d], k and v [b, h, t, d]; seen broadcasts to [b, h, s, t]."""
    scores = (q.float() @ k.float().transpose(-1, -2)) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~seen, -torch.inf)
    # Half the log-softmax, since a root has no finite slope where a weight is 0.
    weights = (0.5 * scores.log_softmax(-1)).exp()
    out: Tensor = weights.to(v.dtype) @ v
    return out
