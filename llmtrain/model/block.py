"""A transformer block: attention and MLP branches on the residual stream."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import cast

import torch
from torch import Tensor, nn

from llmtrain.config.schema import ModelConfig
from llmtrain.linear import Matmul
from llmtrain.model.attention import Attention
from llmtrain.model.dropout import Dropout
from llmtrain.model.masks import AttentionContext
from llmtrain.model.mlp import MLP
from llmtrain.model.norm import Norm
from llmtrain.model.pair import HiddenLayer
from llmtrain.model.recompute import (
    compiled_selective_recompute,
    forgotten,
    full_recompute,
)
from llmtrain.model.scaling import residual_weights
from llmtrain.ops import Casts
from llmtrain.parallel.tensor import TensorParallel

RECOMPUTE_MODES = ("none", "selective", "full")


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); x: [b, s, d_model], or the token shard
    [n / t, d_model] of this rank under sequence parallelism.

    With ``parallel_residual``: x + attention(norm(x)) + mlp(norm(x)), each with its own norm.
    With ``norm_placement: post_branch`` (OLMo-2): x + norm(attention(x)), x + norm(mlp(x)), or
    a x + b norm(...) with the constants of ``scaling.residual_weights``.
    recompute: what backward computes again instead of keeping, see ``apply_recompute``. index:
    among all blocks of the model, which names its streams of dropout.
    """

    def __init__(
        self, cfg: ModelConfig, matmul: Matmul, tensor: TensorParallel | None, index: int
    ) -> None:
        super().__init__()
        partial = tensor is not None and tensor.sequence
        norm = (cfg.d_model, cfg.norm, cfg.norm_eps, cfg.norm_bias)
        self.pre_norm, self.parallel = cfg.norm_placement == "pre", cfg.parallel_residual
        # (a, b) of a x + b branch. Only branches that are normed at their end have any but 1.
        self.attention_residual = residual_weights(cfg, 2 * index)
        self.mlp_residual = residual_weights(cfg, 2 * index + 1)
        self.recompute, self.dropout = "none", cfg.dropout
        self.attention_norm = Norm(*norm, partial=partial)
        self.attention = Attention(cfg, matmul, tensor, index)
        self.mlp_norm = Norm(*norm, partial=partial)
        self.mlp = MLP(cfg, matmul, tensor, index)
        self.attention_dropout = Dropout(f"blocks.{index}.attention", cfg.dropout)
        self.mlp_dropout = Dropout(f"blocks.{index}.mlp", cfg.dropout)

    def forward(self, x: Tensor, context: AttentionContext) -> Tensor:
        if self.recompute == "none" or not self.training:
            return self._run(x, context)
        if self.recompute == "full":
            return cast(Tensor, full_recompute(self._run, x, context))
        if torch.compiler.is_compiling():
            return cast(Tensor, compiled_selective_recompute(self._run, x, context))
        return self._run(x, context, lean=True)

    def _run(self, x: Tensor, context: AttentionContext, lean: bool = False) -> Tensor:
        """lean: the results of norms and activation are not kept for backward."""
        keys = context.keys
        if not self.pre_norm:
            x, casts = self._attend_post(x, context)
            stay, gain = self.mlp_residual
            branch = self.mlp_norm(self.mlp(x, lean, casts), gain)
            return _join(x, self.mlp_dropout(branch, keys), stay)
        if self.parallel:
            return self._run_parallel(x, context, lean)
        x, normed, casts = _normed(self.attention_norm, x, None, self.attention.qkv)
        with self._forgetting(normed, self.attention_norm, x, lean):
            branch = self.attention_dropout(self.attention(normed, context, casts), keys)
        x, normed, casts = _normed(self.mlp_norm, x, branch, self.mlp.up)
        with self._forgetting(normed, self.mlp_norm, x, lean):
            out = x + self.mlp_dropout(self.mlp(normed, lean, casts), keys)
        return cast(Tensor, out)

    def _attend_post(self, x: Tensor, context: AttentionContext) -> tuple[Tensor, Casts | None]:
        """The stream after an attention branch with its norm at the end, and its cast for the
        MLP where both are made together."""
        stay, gain = self.attention_residual
        branch, norm, layer = self.attention(x, context), self.attention_norm, self.mlp.up
        if self.dropout == 0 and layer.takes_casts(branch) and norm.casts(branch):
            return norm.joined_with_casts(x, branch, stay, gain, layer)
        branch = self.attention_dropout(norm(branch, gain), context.keys)
        return _join(x, branch, stay), None

    def _run_parallel(self, x: Tensor, context: AttentionContext, lean: bool) -> Tensor:
        normed, other = self.attention_norm(x), self.mlp_norm(x)
        with self._forgetting(normed, self.attention_norm, x, lean):
            out = x + self.attention_dropout(self.attention(normed, context), context.keys)
        with self._forgetting(other, self.mlp_norm, x, lean):
            return cast(Tensor, out + self.mlp_dropout(self.mlp(other, lean), context.keys))

    @staticmethod
    def _forgetting(
        normed: Tensor, norm: Norm, x: Tensor, lean: bool
    ) -> AbstractContextManager[None]:
        """Its consumers compute ``normed`` again from ``x``, which the norm keeps."""
        kept = x.detach()
        return forgotten(normed, lambda: norm(kept)) if lean else nullcontext()


def _normed(
    norm: Norm, x: Tensor, branch: Tensor | None, layer: HiddenLayer
) -> tuple[Tensor, Tensor, Casts | None]:
    """``norm.after``, and the result in FP8 for ``layer`` where both are made together."""
    if layer.takes_casts(x) and norm.casts(x):
        return norm.after_with_casts(x, branch, layer)
    return *norm.after(x, branch), None


def _join(x: Tensor, branch: Tensor, stay: float) -> Tensor:
    """stay x + branch, rounded once."""
    return x + branch if stay == 1.0 else torch.add(branch, x, alpha=stay)
