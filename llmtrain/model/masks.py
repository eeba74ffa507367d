"""What all blocks of one forward share: rotary tables and the bounds of documents."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from llmtrain.model.cache import KeyValueCache
from llmtrain.ops import FLEX_MIN_HEAD, first_of_document
from llmtrain.parallel.context_attention import ContextPlan

__all__ = ["FLEX_MIN_HEAD", "AttentionContext", "document_block_mask", "first_of_document"]


@dataclass(frozen=True)
class AttentionContext:
    """shape: (b, s) of the tokens. rotary: (cos, sin) of ``rotary_table``, or None. first: [b, s]
    int32, the first key each query sees, or None for plain causal attention. block_mask: the
    same as a BlockMask where flex_attention runs it. keys: of this rank's tokens, for dropout,
    or None for none. plan: instead of first and block_mask, where this rank has a part of each
    sequence. cache: of earlier keys and values, to which this forward adds its own; seen: which of
    all these each token sees, None where there are no earlier ones."""

    shape: tuple[int, int]
    rotary: tuple[Tensor, Tensor] | None
    first: Tensor | None = None
    block_mask: Any = None
    keys: Tensor | None = None
    plan: ContextPlan | None = None
    cache: KeyValueCache | None = None
    seen: Tensor | None = None


@cache
def _compiled_create_block_mask() -> Any:
    # Compiled, it never holds the whole [b, s, s] mask.
    from torch.nn.attention.flex_attention import create_block_mask

    return torch.compile(create_block_mask)


def document_block_mask(first: Tensor) -> Any:
    """BlockMask of causal attention from ``first`` [b, s] on, for flex_attention."""
    from torch.nn.attention.flex_attention import create_block_mask

    def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & (k >= first[b, q])

    b, s = first.shape
    create = _compiled_create_block_mask() if first.is_cuda else create_block_mask
    return create(sees, b, None, s, s, device=str(first.device))
