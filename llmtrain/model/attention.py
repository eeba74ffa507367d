"""Causal self-attention with grouped queries and one fused projection."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from llmtrain.config.schema import ModelConfig
from llmtrain.linear import Matmul, fake_vectors
from llmtrain.model.hidden import hidden_layer
from llmtrain.model.masks import AttentionContext
from llmtrain.model.norm import Norm, SplitRMSNorm
from llmtrain.ops import (
    Casts,
    cached_attention,
    causal_attention,
    rotate,
    split_rotary,
    sqrt_attention,
)
from llmtrain.parallel.context_attention import context_attention
from llmtrain.parallel.tensor import TensorParallel
from llmtrain.parallel.uncompiled import uncompiled


@cache
def _flex_attention() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def attend(
    q: Tensor, k: Tensor, v: Tensor, context: AttentionContext, *, root: bool = False
) -> Tensor:
    """softmax(q k^T / sqrt(d)) v. q: [b, h, s, d], k and v: [b, g, s, d] -> [b, s, h, d].

    root: the root of the softmax instead, which context parallelism cannot have.
    """
    if root:
        assert context.plan is None
        return sqrt_attention(q, k, v, context.first)
    if context.plan is not None:
        whole: Tensor = context_attention(q, k, v, context.plan)
        return whole
    if context.block_mask is None:
        return causal_attention(q, k, v, context.first)
    grouped = q.shape[1] != k.shape[1]
    out: Tensor = _flex_attention()(q, k, v, block_mask=context.block_mask, enable_gqa=grouped)
    return out.transpose(1, 2)


class Attention(nn.Module):
    """Self-attention. x: [b, s, d_model] -> the same, or token shards of both, see ``Block``.

    ``qkv.weight`` is [(n_heads + 2 n_kv_heads) d_head, d_model] in order of query groups: for
    each key/value head its n_heads / n_kv_heads query heads, the key, the value. So a contiguous
    split along dim 0 is a split by groups (tensor parallelism). n_heads and n_groups: of this
    rank. index: of the block among all, by which a cache knows it.
    """

    def __init__(
        self, cfg: ModelConfig, matmul: Matmul, tensor: TensorParallel | None, index: int = 0
    ) -> None:
        super().__init__()
        assert cfg.n_kv_heads is not None and cfg.d_head is not None
        self.index = index
        ranks = 1 if tensor is None else tensor.size
        self.n_heads, self.d_head = cfg.n_heads // ranks, cfg.d_head
        self.n_groups = max(cfg.n_kv_heads // ranks, 1)
        width = cfg.n_heads * cfg.d_head
        kv_width = cfg.n_kv_heads * cfg.d_head
        self.qkv = hidden_layer(cfg, f"blocks.{index}.attention.qkv", matmul, tensor)
        self.out = hidden_layer(cfg, f"blocks.{index}.attention.out", matmul, tensor)
        self.root = cfg.scaling.attention == "sqrt"
        # The number format that keys and values are rounded to, see ``quantization.kv``.
        self.kv_format = "none"
        self.q_norm: Norm | None = None
        self.k_norm: Norm | None = None
        self.qk_norm = cfg.qk_norm
        if cfg.qk_norm == "full" and tensor is not None:
            split = (cfg.norm_eps, cfg.norm_bias, tensor)
            self.q_norm = SplitRMSNorm(width, *split)
            self.k_norm = SplitRMSNorm(kv_width, *split, tensor.kv_group)
        elif cfg.qk_norm != "none":
            full = cfg.qk_norm == "full"
            sizes = (width, kv_width) if full else (cfg.d_head, cfg.d_head)
            kind = (cfg.norm, cfg.norm_eps, cfg.norm_bias)
            # Each rank sees its own heads, with or without sequence parallelism.
            self.q_norm = Norm(sizes[0], *kind, partial=tensor is not None)
            self.k_norm = Norm(sizes[1], *kind, partial=tensor is not None)

    def forward(self, x: Tensor, context: AttentionContext, casts: Casts | None = None) -> Tensor:
        """casts: x as ``qkv`` reads it, where its producer has cast it."""
        b, s = context.shape
        per_group = self.n_heads // self.n_groups
        qkv = self.qkv(x, casts).flatten(0, -2)[: b * s]
        qkv = qkv.view(b, s, self.n_groups, per_group + 2, self.d_head)
        if context.rotary is not None and self.q_norm is None:
            q, k, v = split_rotary(qkv, *context.rotary)
        else:
            q, k, v = self._split(qkv)
            if context.rotary is not None:
                q, k = rotate(q, *context.rotary), rotate(k, *context.rotary)
        if self.kv_format != "none":
            k, v = fake_vectors(k, self.kv_format), fake_vectors(v, self.kv_format)
        if context.cache is None:
            mixed = attend(q, k, v, context, root=self.root)
        else:
            mixed = self._attend_cached(q, k, v, context)
        out: Tensor = self.out(mixed.reshape(b, s, -1))
        return out

    @uncompiled
    def _attend_cached(self, q: Tensor, k: Tensor, v: Tensor, context: AttentionContext) -> Tensor:
        """``attend`` of new tokens to themselves and to those in the cache."""
        assert context.cache is not None
        keys, values = context.cache.write(self.index, k, v)
        if context.seen is None:
            return attend(q, k, v, context, root=self.root)
        return cached_attention(q, keys, values, context.seen, root=self.root)

    def _split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [b, h, s, d], k and v [b, g, s, d] of qkv [b, s, g, h / g + 2, d], normalised."""
        b, s = qkv.shape[:2]
        # Copies: a view would keep all of qkv until backward.
        q, k, v = qkv[..., :-2, :], qkv[..., -2, :].contiguous(), qkv[..., -1, :].contiguous()
        q = q.reshape(b, s, self.n_heads, self.d_head).contiguous()
        if self.q_norm is not None and self.k_norm is not None:
            if self.qk_norm == "full":
                q, k = q.flatten(2), k.flatten(2)
            q, k = self.q_norm(q), self.k_norm(k)
            q = q.view(b, s, self.n_heads, self.d_head)
            k = k.view(b, s, self.n_groups, self.d_head)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
