"""The decoder: embedding, blocks, final norm, head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmtrain.config.schema import ModelConfig
from llmtrain.linear import Linear, Matmul, OperandCache, apply_linear, matmul_for
from llmtrain.model.block import RECOMPUTE_MODES, Block
from llmtrain.model.masks import (
    FLEX_MIN_HEAD,
    AttentionContext,
    document_block_mask,
    first_of_document,
)
from llmtrain.model.norm import Norm
from llmtrain.model.resolve import padded_vocab
from llmtrain.model.rotary import rotary_table

HeadFn = Callable[[Tensor, "Head"], Any]


class _Embed(torch.autograd.Function):
    """Rows of a table in another dtype; the table's gradient is summed in float32."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(index)
        ctx.rows, ctx.dtype = weight.shape[0], weight.dtype
        return F.embedding(index, weight).to(dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (index,) = ctx.saved_tensors
        dense = torch.ops.aten.embedding_dense_backward(grad.float(), index, ctx.rows, -1, False)
        return dense.to(ctx.dtype), None, None


class Embedding(nn.Module):
    """Token or position embedding. index: integers [...] -> [..., d_model] of ``dtype``."""

    def __init__(self, rows: int, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.weight = nn.Parameter(torch.empty(rows, width, dtype=torch.float32))

    def forward(self, index: Tensor) -> Tensor:
        out: Tensor = _Embed.apply(self.weight, index, self.dtype)  # type: ignore[no-untyped-call]
        return out


class Head(nn.Module):
    """Logits of the next token. hidden [..., d_model] -> [..., vocab_size].

    ``weight`` is [padded vocabulary, d_model]: the head's own parameter, or the embedding's when
    tied. Rows from ``vocab_size`` on are padding and never take part.
    """

    def __init__(self, cfg: ModelConfig, embedding: Embedding, matmul: Matmul) -> None:
        super().__init__()
        assert cfg.vocab_size is not None
        self.vocab_size, self.matmul = cfg.vocab_size, matmul
        # Looked up through the owner each time: FSDP2 replaces parameters of their owner.
        self._tied_to = [embedding] if cfg.tie_embeddings else []
        self._cache = OperandCache()
        if not cfg.tie_embeddings:
            rows = padded_vocab(cfg)
            self.projection = Linear(cfg.d_model, rows, role="head", matmul=matmul)

    @property
    def weight(self) -> Tensor:
        """The parameter, or what FSDP2 gathered for this forward."""
        return self._tied_to[0].weight if self._tied_to else self.projection.weight

    def operand(self) -> Tensor:
        """``weight`` as the products read it, without gradient."""
        return self._cache.get(self.weight, self.matmul)

    def forward(self, hidden: Tensor) -> Tensor:
        logits = apply_linear(hidden, self.weight, None, self.operand(), self.matmul)
        return logits[..., : self.vocab_size]


class Decoder(nn.Module):
    """A decoder-only language model of the shape ``cfg`` (resolved, see ``resolve_model``).

    compute_dtype: float32 or bfloat16, of products and residual stream; parameters are float32.
    Build it under ``torch.device("meta")`` or not; either way the parameters hold nothing until
    ``init_weights``.
    """

    def __init__(self, cfg: ModelConfig, compute_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        assert cfg.max_seq_len is not None
        self.cfg, self.compute_dtype = cfg, compute_dtype
        matmul = matmul_for(compute_dtype)
        self.embedding = Embedding(padded_vocab(cfg), cfg.d_model, compute_dtype)
        if cfg.position == "learned":
            self.position_embedding = Embedding(cfg.max_seq_len, cfg.d_model, compute_dtype)
        self.blocks = nn.ModuleList(Block(cfg, matmul) for _ in range(cfg.n_layers))
        self.final_norm = Norm(cfg.d_model, cfg.norm, cfg.norm_eps, cfg.norm_bias)
        self.head = Head(cfg, self.embedding, matmul)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        doc_ids: Tensor | None = None,
        head_fn: HeadFn | None = None,
    ) -> Any:
        """Logits [b, s, vocab_size] in compute_dtype, or what ``head_fn(hidden, head)`` returns.

        tokens: [b, s] int64. positions: [b, s] int64; None: 0..s-1. doc_ids: [b, s] integers
        that confine attention to equal numbers; None: plain causal. head_fn runs inside this
        forward, where FSDP2 has the head's weight gathered; hidden is [b, s, d_model].
        """
        x = self.embedding(tokens)
        if self.cfg.position == "learned":
            index = torch.arange(tokens.shape[1], device=tokens.device)
            x = x + self.position_embedding(index if positions is None else positions)
        context = self._context(positions, doc_ids, x)
        for block in self.blocks:
            x = block(x, context)
        hidden = self.final_norm(x)
        return self.head(hidden) if head_fn is None else head_fn(hidden, self.head)

    def _context(
        self, positions: Tensor | None, doc_ids: Tensor | None, x: Tensor
    ) -> AttentionContext:
        first = None if doc_ids is None else first_of_document(doc_ids)
        # flex_attention skips blocks between documents, but has no backward on the CPU.
        block_mask = None
        if first is not None and first.is_cuda and (self.cfg.d_head or 0) >= FLEX_MIN_HEAD:
            block_mask = document_block_mask(first)
        if self.cfg.position != "rope":
            return AttentionContext(None, first, block_mask)
        assert self.cfg.d_head is not None and self.cfg.max_seq_len is not None
        length = x.shape[1] if positions is None else max(x.shape[1], self.cfg.max_seq_len)
        rotary = rotary_table(positions, length, self.cfg.d_head, self.cfg.rope_theta, x.device)
        return AttentionContext(rotary, first, block_mask)


def apply_recompute(model: Decoder, mode: str) -> None:
    """Set what backward computes again: none, selective (all but products and attention), full.

    full keeps only the input of each block (about a third more arithmetic). selective keeps the
    results of matrix products and attention and repeats norms, rotations and activations.
    """
    if mode not in RECOMPUTE_MODES:
        raise ValueError(f"recompute mode {mode!r} is not one of {', '.join(RECOMPUTE_MODES)}")
    for block in model.blocks:
        assert isinstance(block, Block)
        block.recompute = mode


def compile_blocks(model: Decoder) -> None:
    """torch.compile each block in place; names of parameters stay as they are."""
    for block in model.blocks:
        block.compile()
