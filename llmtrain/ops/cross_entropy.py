"""Softmax cross-entropy of logits and its gradient, in place."""

from __future__ import annotations

import torch
from torch import Tensor

from llmtrain.ops.native import kernels, usable


def cross_entropy_reference_(
    logits: Tensor,
    targets: Tensor,
    weights: Tensor,
    vocab: int,
    z_loss: float,
    smoothing: float,
    grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``cross_entropy_`` in plain PyTorch."""
    real = logits[:, :vocab].float()
    log_prob = torch.log_softmax(real, -1)
    index = targets[:, None]
    nll = -log_prob.gather(1, index).squeeze(1)
    lse = real.gather(1, index).squeeze(1) + nll
    loss, z = nll, z_loss * lse.square()
    if smoothing:
        loss = (1 - smoothing) * nll - smoothing * log_prob.mean(-1)
    if grad:
        slope = log_prob.exp_()
        if z_loss:
            slope.mul_((1 + 2 * z_loss * lse)[:, None])
        if smoothing:
            slope.sub_(smoothing / vocab)
        hit = slope.new_full((1, 1), smoothing - 1).expand_as(index)
        slope.scatter_add_(1, index, hit).mul_(weights[:, None])
        logits[:, :vocab] = slope
        logits[:, vocab:] = 0
    return nll, loss + z, z


def cross_entropy_(
    logits: Tensor,
    targets: Tensor,
    weights: Tensor,
    vocab: int,
    z_loss: float,
    smoothing: float,
    grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy of the first ``vocab`` columns of logits [n, padded], float32 arithmetic.

    Returns nll, loss and z, each [n] float32 and unweighted: with lse the log-sum-exp,
    nll = lse - logit[target], z = z_loss lse^2 and loss = (1 - e) nll + e mean(lse - logit) + z
    for label smoothing e. targets: [n] int64; weights: [n] float32. grad: overwrite ``logits``
    with weights times the gradient of loss, 0 in the padding.
    """
    run = kernels().cross_entropy_ if usable(logits) else cross_entropy_reference_
    nll, loss, z = run(logits, targets, weights, vocab, z_loss, smoothing, grad)
    return nll, loss, z
