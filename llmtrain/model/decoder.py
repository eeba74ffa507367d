"""The decoder: embedding, blocks, final norm, head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from llmtrain.config.schema import ModelConfig
from llmtrain.linear import Linear, matmul_for
from llmtrain.model.adapters import add_adapters
from llmtrain.model.block import RECOMPUTE_MODES, Block
from llmtrain.model.cache import KeyValueCache
from llmtrain.model.dropout import Dropout
from llmtrain.model.embedding import Embedding, Head, VocabularyEmbedding
from llmtrain.model.masks import (
    FLEX_MIN_HEAD,
    AttentionContext,
    document_block_mask,
    first_of_document,
)
from llmtrain.model.norm import Norm
from llmtrain.model.pair import Factorized
from llmtrain.model.resolve import padded_vocab
from llmtrain.model.rotary import Rotation, rotary_table
from llmtrain.model.scaling import multiplier
from llmtrain.parallel import SplitSequence, TensorParallel
from llmtrain.parallel.context_attention import plan_context
from llmtrain.parallel.pipeline import Part

HeadFn = Callable[[Tensor, Head], Any]


class Decoder(nn.Module):
    """A decoder-only language model of the shape ``cfg`` (resolved, see ``resolve_model``).

    compute_dtype: float32 or bfloat16, of products and residual stream; parameters are float32.
    Build it under ``torch.device("meta")`` or not; either way the parameters hold nothing until
    ``init_weights``. tensor: the ranks that share its matrices; its parameters have their whole
    shapes until ``shard_over_tensor``. stage: build this part of the model only (pipeline
    parallelism), under the names that its parameters have in the whole.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        compute_dtype: torch.dtype = torch.float32,
        tensor: TensorParallel | None = None,
        stage: Part | None = None,
    ) -> None:
        super().__init__()
        assert cfg.max_seq_len is not None
        self.cfg, self.compute_dtype, self.tensor = cfg, compute_dtype, tensor
        matmul = matmul_for(compute_dtype)
        partial = tensor is not None and tensor.sequence
        table = (padded_vocab(cfg), cfg.d_model, compute_dtype)
        stage = stage or Part(range(cfg.n_layers), True, True)
        self.first, self.last = stage.first, stage.last
        if stage.first or (stage.last and cfg.tie_embeddings):
            self.embedding: Embedding
            self.embedding = VocabularyEmbedding(*table, tensor) if tensor else Embedding(*table)
        if stage.first and cfg.position == "learned":
            self.position_embedding = Embedding(
                cfg.max_seq_len, cfg.d_model, compute_dtype, partial=partial
            )
        self.dropout = Dropout("embedding", cfg.dropout)
        self.blocks = nn.ModuleList()
        for i in stage.blocks:
            self.blocks.add_module(str(i), Block(cfg, matmul, tensor, i))
        if stage.last:
            norm = (cfg.d_model, cfg.norm, cfg.norm_eps, cfg.norm_bias)
            self.final_norm = Norm(*norm, partial=partial)
            tied = self.embedding if cfg.tie_embeddings else None
            scale = multiplier(cfg, "head", cfg.d_model)
            self.head = Head(cfg, tied, matmul, tensor, scale)
        if cfg.adapters is not None:
            add_adapters(self, cfg)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        doc_ids: Tensor | None = None,
        head_fn: HeadFn | None = None,
        keys: Tensor | None = None,
        part: SplitSequence | None = None,
        hidden: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> Any:
        """Logits [b, s, vocab_size] in compute_dtype, or what ``head_fn(hidden, head)`` returns.

        tokens: [b, s] int64. positions: [b, s] int64; None: 0..s-1. doc_ids: [b, s] integers
        that confine attention to equal numbers; None: plain causal. head_fn runs inside this
        forward, where FSDP2 has the head's weight gathered; hidden is [b, s, d_model]. keys:
        [b, s] of ``token_keys``, for dropout; None: nothing is dropped. part: the tokens are this
        rank's part of each sequence (context parallelism); then ``positions`` are needed and
        doc_ids not read. Collective over the context ranks. hidden: of the stage before, where
        this is a later one; a stage that is not the last returns its own (see ``travels``). cache:
        of the tokens before these, for generation; their keys and values are added to it, and the
        logits are [b, 1, vocab_size], of each row's last token that ``cache.begin`` counts.
        """
        if cache is not None:
            positions = cache.positions(tokens.shape[1])
        context = self._context(tokens, positions, doc_ids, keys, part)
        if cache is not None:
            seen = None if cache.empty else cache.visible(tokens.shape[1])
            context = replace(context, cache=cache, seen=seen)
        if hidden is None:
            assert self.first
            x = self.dropout(self._embed(tokens, positions), context.keys)
        else:
            x = hidden
        for block in self.blocks:
            x = block(x, context)
        if not self.last:
            return x
        hidden = self.final_norm(x)
        if self.tensor is not None:
            n, d = tokens.numel(), self.cfg.d_model
            hidden = self.tensor.enter(hidden).reshape(-1, d)[:n].view(*tokens.shape, d)
        if cache is not None:
            hidden = hidden[torch.arange(len(hidden), device=hidden.device), cache.last][:, None]
        return self.head(hidden) if head_fn is None else head_fn(hidden, self.head)

    def travels(self, tokens: Tensor) -> Tensor:
        """An empty tensor like the hidden states between stages: [b, s, d_model], or the token
        shard [n / t, d_model] under sequence parallelism. tokens: [b, s]."""
        width = (self.cfg.d_model,)
        shape = (*tokens.shape, *width)
        if self.tensor is not None and self.tensor.sequence:
            shape = (-(-tokens.numel() // self.tensor.size), *width)
        return torch.empty(shape, dtype=self.compute_dtype, device=tokens.device)

    def _embed(self, tokens: Tensor, positions: Tensor | None) -> Tensor:
        """The residual stream before the first block."""
        x: Tensor = self.embedding(tokens)
        if self.cfg.position != "learned":
            return x
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)
        if self.tensor is not None and self.tensor.sequence:
            positions = self.tensor.own(positions.expand_as(tokens).reshape(-1))
        out: Tensor = x + self.position_embedding(positions)
        return out

    def _context(
        self,
        tokens: Tensor,
        positions: Tensor | None,
        doc_ids: Tensor | None,
        keys: Tensor | None,
        part: SplitSequence | None,
    ) -> AttentionContext:
        shape = (tokens.shape[0], tokens.shape[1])
        rotary = self._rotary(shape[1], positions, tokens.device)
        if keys is not None and self.tensor is not None and self.tensor.sequence:
            keys = self.tensor.own(keys.reshape(-1))
        assert self.cfg.d_head is not None
        if part is not None:
            assert positions is not None
            plan = plan_context(part, shape[1], self.cfg.d_head)
            return AttentionContext(shape, rotary, keys=keys, plan=plan)
        first = None if doc_ids is None else first_of_document(doc_ids)
        # flex_attention skips blocks between documents, but has no backward on the CPU.
        block_mask = None
        softmax = self.cfg.scaling.attention == "softmax"
        if first is not None and first.is_cuda and self.cfg.d_head >= FLEX_MIN_HEAD and softmax:
            block_mask = document_block_mask(first)
        return AttentionContext(shape, rotary, first, block_mask, keys)

    def _rotary(
        self, tokens: int, positions: Tensor | None, device: torch.device
    ) -> tuple[Tensor, Tensor] | None:
        if self.cfg.position != "rope":
            return None
        assert self.cfg.d_head is not None and self.cfg.max_seq_len is not None
        length = tokens if positions is None else max(tokens, self.cfg.max_seq_len)
        rotation = Rotation(
            self.cfg.d_head, self.cfg.rope_theta, self.cfg.rope_scaling, self.cfg.rope_fraction
        )
        return rotary_table(positions, length, rotation, device)


def apply_recompute(model: Decoder, mode: str) -> None:
    """Set what backward computes again: none, selective (norms and activations), full.

    full keeps only the input of each block (about a third more arithmetic, and the collectives
    of forward once more). selective repeats norms and activations, which are bandwidth only; under
    torch.compile it keeps the results of products and attention and repeats all else.
    """
    if mode not in RECOMPUTE_MODES:
        raise ValueError(f"recompute mode {mode!r} is not one of {', '.join(RECOMPUTE_MODES)}")
    for block in model.blocks:
        assert isinstance(block, Block)
        block.recompute = mode
        for layer in block.modules():
            if isinstance(layer, Factorized):
                layer.lean = mode == "selective"


def compile_blocks(model: Decoder) -> None:
    """torch.compile each block in place; names of parameters stay as they are."""
    for block in model.blocks:
        block.compile()
    layers = [module for module in model.modules() if isinstance(module, Linear)]

    def prepare(model: nn.Module, args: object) -> None:
        for layer in layers:
            layer.prepare()

    model.register_forward_pre_hook(prepare)
