"""Causal self-attention with grouped queries and one fused projection."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from llmtrain.config.schema import ModelConfig
from llmtrain.linear import Linear, Matmul
from llmtrain.model.masks import AttentionContext
from llmtrain.model.norm import Norm
from llmtrain.ops import causal_attention, rotate, split_rotary


@cache
def _flex_attention() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def attend(q: Tensor, k: Tensor, v: Tensor, context: AttentionContext) -> Tensor:
    """softmax(q k^T / sqrt(d)) v. q: [b, h, s, d], k and v: [b, g, s, d] -> [b, s, h, d]."""
    if context.block_mask is None:
        return causal_attention(q, k, v, context.first)
    grouped = q.shape[1] != k.shape[1]
    out: Tensor = _flex_attention()(q, k, v, block_mask=context.block_mask, enable_gqa=grouped)
    return out.transpose(1, 2)


class Attention(nn.Module):
    """Self-attention. x: [b, s, d_model] -> the same.

    ``qkv.weight`` is [(n_heads + 2 n_kv_heads) d_head, d_model] in order of query groups: for
    each key/value head its n_heads / n_kv_heads query heads, the key, the value. So a contiguous
    split along dim 0 is a split by groups (tensor parallelism).
    """

    def __init__(self, cfg: ModelConfig, matmul: Matmul) -> None:
        super().__init__()
        assert cfg.n_kv_heads is not None and cfg.d_head is not None
        self.n_heads, self.n_groups, self.d_head = cfg.n_heads, cfg.n_kv_heads, cfg.d_head
        width = cfg.n_heads * cfg.d_head
        kv_width = cfg.n_kv_heads * cfg.d_head
        self.qkv = Linear(cfg.d_model, width + 2 * kv_width, cfg.attention_bias, matmul=matmul)
        self.out = Linear(width, cfg.d_model, cfg.attention_out_bias, matmul=matmul)
        self.q_norm: Norm | None = None
        self.k_norm: Norm | None = None
        self.qk_norm = cfg.qk_norm
        if cfg.qk_norm != "none":
            full = cfg.qk_norm == "full"
            sizes = (width, kv_width) if full else (cfg.d_head, cfg.d_head)
            self.q_norm = Norm(sizes[0], cfg.norm, cfg.norm_eps, cfg.norm_bias)
            self.k_norm = Norm(sizes[1], cfg.norm, cfg.norm_eps, cfg.norm_bias)

    def forward(self, x: Tensor, context: AttentionContext) -> Tensor:
        b, s, _ = x.shape
        per_group = self.n_heads // self.n_groups
        qkv = self.qkv(x).view(b, s, self.n_groups, per_group + 2, self.d_head)
        if context.rotary is not None and self.q_norm is None:
            q, k, v = split_rotary(qkv, *context.rotary)
        else:
            q, k, v = self._split(qkv)
            if context.rotary is not None:
                q, k = rotate(q, *context.rotary), rotate(k, *context.rotary)
        out: Tensor = self.out(attend(q, k, v, context).reshape(b, s, -1))
        return out

    def _split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [b, h, s, d], k and v [b, g, s, d] of qkv [b, s, g, h / g + 2, d], normalised."""
        b, s = qkv.shape[:2]
        q, k, v = qkv[..., :-2, :], qkv[..., -2, :], qkv[..., -1, :]
        q = q.reshape(b, s, self.n_heads, self.d_head)
        if self.q_norm is not None and self.k_norm is not None:
            if self.qk_norm == "full":
                q, k = q.flatten(2), k.flatten(2)
            q, k = self.q_norm(q), self.k_norm(k)
            q = q.view(b, s, self.n_heads, self.d_head)
            k = k.view(b, s, self.n_groups, self.d_head)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
