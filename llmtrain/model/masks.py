"""Attention masks: which earlier positions a position sees."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class AttentionContext:
    """What all blocks of one forward share.

    rotary: (cos, sin) of ``rotary_table``, or None. mask: None for plain causal attention, a
    bool tensor [b, 1, s, s] (True: sees) for SDPA, or a flex_attention BlockMask.
    """

    rotary: tuple[Tensor, Tensor] | None
    mask: Any


def document_mask(doc_ids: Tensor) -> Any:
    """Causal attention inside documents. doc_ids: [b, s] integers, constant in a document.

    Positions see the earlier ones (and themselves) that carry the same number. On CUDA a
    BlockMask for compiled flex_attention, which skips empty blocks; elsewhere, where
    flex_attention has no backward, a bool mask [b, 1, s, s].
    """
    if doc_ids.is_cuda:
        return _block_mask(doc_ids)
    same = doc_ids[:, None, :, None] == doc_ids[:, None, None, :]
    return same.tril_()


def _block_mask(doc_ids: Tensor) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= k) & (doc_ids[b, q] == doc_ids[b, k])

    b, s = doc_ids.shape
    return create_block_mask(sees, b, None, s, s, device=doc_ids.device)
