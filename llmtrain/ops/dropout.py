"""Dropout whose mask is a function of what is dropped, so that no layout can change it.

The mask of an element is a hash of (seed, global sample number, position, stream, channel). There
is no generator whose state would have to be saved, restored around recomputation, or kept apart
between tensor-parallel ranks: token shards, micro-batches, pipeline stages and a resumed run all
find the same mask.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF


def _hash(x: Tensor) -> Tensor:
    """A bijective hash of 32-bit values held in int64 (two rounds of multiply and xor-shift)."""
    for _ in range(2):
        # The multiplier has 27 bits: the product stays below 2^63.
        x = (((x >> 16) ^ x) * 0x45D9F3B) & _WORD
    return (x >> 16) ^ x


def stream_number(name: str) -> int:
    """A 32-bit number for a named stream, such as ``blocks.3.mlp``."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "little")


def token_keys(seed: int, sample_ids: Tensor, positions: Tensor) -> Tensor:
    """A key for every token of a run.

    sample_ids: [b] int64, global sample numbers; positions: [s] or [b, s] int64 within the
    sample. Returns [b, s] int64, 32 bits each.
    """
    start = stream_number(f"seed {seed}")
    low = _hash((sample_ids & _WORD) ^ start)
    sample = _hash(low ^ (sample_ids >> 32))
    return _hash((sample[:, None] + _hash(positions & _WORD)) & _WORD)


@lru_cache(maxsize=256)
def _channels(stream: int, width: int, device: torch.device) -> Tensor:
    return _hash((torch.arange(width, device=device) + stream) & _WORD)


def _factors(keys: Tensor, stream: int, width: int, p: float, dtype: torch.dtype) -> Tensor:
    """[..., width]: 1 / (1 - p) where an element is kept, else 0."""
    word = _hash(_hash(keys)[..., None] ^ _channels(stream, width, keys.device))
    return (word >= round(p * (_WORD + 1))).to(dtype) * (1.0 / (1.0 - p))


class _Dropout(torch.autograd.Function):
    """Keeps the keys only; the mask is computed again in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, keys: Tensor, stream: int, p: float) -> Tensor:
        ctx.save_for_backward(keys)
        ctx.stream, ctx.p = stream, p
        return x * _factors(keys, stream, x.shape[-1], p, x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (keys,) = ctx.saved_tensors
        factors = _factors(keys, ctx.stream, grad.shape[-1], ctx.p, grad.dtype)
        return grad * factors, None, None, None


def dropout(x: Tensor, keys: Tensor, stream: int, p: float) -> Tensor:
    """Zero each element with probability ``p`` and divide the others by 1 - p.

    x: [..., d]; keys: [...] int64 of ``token_keys``; stream: of ``stream_number``, different
    wherever masks have to be independent. Returns x's shape and dtype.
    """
    out: Tensor = _Dropout.apply(x, keys, stream, p)  # type: ignore[no-untyped-call]
    return out
