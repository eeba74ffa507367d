"""Head and cross-entropy together, a chunk of tokens at a time.

The gradients of the hidden states and of the head weight are formed in the forward pass, while
a chunk's logits exist; backward only scales them by the incoming gradient. So the logits of all
tokens never exist at once, and are never computed twice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from llmtrain.config.schema import LossConfig
from llmtrain.linear import Matmul, Operand
from llmtrain.loss.vocabulary import split_cross_entropy_
from llmtrain.ops import cross_entropy_
from llmtrain.parallel.tensor import TensorParallel


class HeadLike(Protocol):
    """What the loss needs of a head."""

    vocab_size: int  # rows of the weight from here on are padding
    matmul: Matmul
    tensor: TensorParallel | None  # the ranks over which the rows are split
    scale: float  # multiplies the logits

    @property
    def weight(self) -> Tensor:
        """[padded vocabulary, d_model], a parameter, or this rank's rows of it."""
        ...

    def operand(self) -> Operand:
        """The weight as the matmul reads it."""
        ...


@dataclass
class LossOutput:
    """loss: scalar float32 to call backward on. nll: [b, s] float32 cross-entropy per token in
    nats, unweighted, detached. z: scalar float32, the z-loss part of ``loss``, detached."""

    loss: Tensor
    nll: Tensor
    z: Tensor


@dataclass(frozen=True)
class _Terms:
    """Constants of one call."""

    matmul: Matmul
    vocab_size: int
    z_loss: float
    smoothing: float
    chunk: int
    grad: bool
    tensor: TensorParallel | None
    in_parts: bool
    scale: float
    weigh: Callable[[Tensor], Tensor] | None = None

    def cross_entropy_(
        self, logits: Tensor, targets: Tensor, weights: Tensor, grad: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """nll, loss and z of a chunk, each [n]; its logits become their gradient."""
        constants = (self.vocab_size, self.z_loss, self.smoothing, grad)
        if self.tensor is None:
            return cross_entropy_(logits, targets, weights, *constants)
        return split_cross_entropy_(logits, targets, weights, *constants, self.tensor)


class _HeadLoss(torch.autograd.Function):
    """(sum of weighted losses, nll [n], z part) of hidden [n, d]; weights carry 1/denominator."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        operand: Operand,
        targets: Tensor,
        weights: Tensor,
        terms: _Terms,
    ) -> tuple[Tensor, Tensor, Tensor]:
        needs_hidden = terms.grad and ctx.needs_input_grad[0]
        needs_weight = terms.grad and ctx.needs_input_grad[1]
        matmul = terms.matmul
        x = hidden.to(matmul.dtype)
        nll = torch.empty(len(x), dtype=torch.float32, device=x.device)
        loss, z = torch.empty_like(nll), torch.empty_like(nll)
        d_hidden = torch.empty_like(hidden) if needs_hidden else None
        d_weight = None
        for start in range(0, len(x), terms.chunk):
            part = slice(start, start + terms.chunk)
            logits = matmul.fprop(x[part], operand, None, terms.scale)
            if terms.weigh is not None:
                # Only one chunk: its logits wait, untouched, for the weights they lead to.
                found, _, _ = terms.cross_entropy_(logits, targets, weights, False)
                weights = terms.weigh(found)
            nll[part], loss[part], z[part] = terms.cross_entropy_(
                logits, targets[part], weights[part], needs_hidden or needs_weight
            )
            if d_hidden is not None:
                d_hidden[part] = matmul.dgrad(logits, operand, terms.scale)
            if needs_weight:
                d_weight = matmul.wgrad(logits, x[part], d_weight)
        if d_weight is not None and terms.scale != 1.0:
            d_weight.mul_(terms.scale)
        ctx.save_for_backward(d_hidden, None if d_weight is None else d_weight.to(weight.dtype))
        ctx.in_parts = terms.in_parts
        z_part = z @ weights
        ctx.mark_non_differentiable(nll, z_part)
        return loss @ weights, nll, z_part

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        if ctx.in_parts:
            scaled = [None if g is None else g * grad for g in ctx.saved_tensors]
        else:
            # In place: a second backward through the same loss is refused by autograd.
            scaled = [None if g is None else g.mul_(grad) for g in ctx.saved_tensors]
        return (*scaled, None, None, None, None)


def head_loss(
    hidden: Tensor,
    head: HeadLike,
    targets: Tensor,
    weights: Tensor,
    cfg: LossConfig,
    denominator: float | Tensor,
    *,
    in_parts: bool = False,
    weigh: Callable[[Tensor], None] | None = None,
) -> LossOutput:
    """Weighted cross-entropy of the next token, and its z-loss.

    loss = sum_t w_t (nll_t + z_loss lse_t^2) / denominator, with lse the log-sum-exp over the
    real vocabulary (PaLM, Chowdhery et al. 2022, section 5); with label smoothing e the nll in
    the sum becomes (1 - e) nll_t + e mean_v(-log p_v). hidden: [b, s, d_model]; targets: [b, s]
    int64 below head.vocab_size, also where the weight is 0; weights: [b, s] float. denominator:
    weight of the whole global batch. Gradients flow to hidden and head.weight; where the head is
    split over tensor-parallel ranks, every rank returns the whole loss and the gradient of
    hidden is this rank's summand. in_parts: backward runs once for hidden and once for the weight
    (zero-bubble pipelines), at the price of a copy of their gradients. weigh: called with the nll
    [b, s] before anything is weighted; it may change ``weights`` in place. With more tokens than
    ``cfg.chunk_tokens``, or a vocabulary that is split, logits are then computed twice.
    """
    if weigh is not None and (targets.numel() > cfg.chunk_tokens or head.tensor is not None):
        with torch.no_grad():
            weigh(head_loss(hidden, head, targets, weights, cfg, denominator).nll)
        weigh = None

    def flat_weights() -> Tensor:
        return weights.reshape(-1).float() / denominator

    def after_weighing(nll: Tensor) -> Tensor:
        assert weigh is not None
        weigh(nll.view(targets.shape))
        return flat_weights()

    terms = _Terms(
        head.matmul,
        head.vocab_size,
        cfg.z_loss,
        cfg.label_smoothing,
        cfg.chunk_tokens,
        torch.is_grad_enabled(),
        head.tensor,
        in_parts,
        head.scale,
        None if weigh is None else after_weighing,
    )
    flat = hidden.reshape(-1, hidden.shape[-1])
    loss, nll, z = _HeadLoss.apply(  # type: ignore[no-untyped-call]
        flat, head.weight, head.operand(), targets.reshape(-1), flat_weights(), terms
    )
    return LossOutput(loss, nll.view(targets.shape), z)
