"""Cross-entropy over a vocabulary that tensor-parallel ranks share."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from llmtrain.parallel.tensor import TensorParallel


def split_cross_entropy_(
    logits: Tensor,
    targets: Tensor,
    weights: Tensor,
    vocab: int,
    z_loss: float,
    smoothing: float,
    grad: bool,
    tensor: TensorParallel,
) -> tuple[Tensor, Tensor, Tensor]:
    """``ops.cross_entropy_`` where each rank has the logits [n, padded / t] of its own words.

    targets, weights: of all n tokens, numbers of the whole vocabulary. Two collectives (Shoeybi
    et al. 2019, section 3): the maximum of [n], then one sum of [n, 3]: the exponentials, the
    target's logit and, for label smoothing, all logits. Returns nll, loss and z, each [n]
    float32, the same on every rank; ``logits`` becomes this rank's part of the gradient. The
    log-sum-exp has the maximum added back before it is squared for the z-loss.
    """
    width = logits.shape[1]
    first = tensor.rank * width
    real = max(0, min(width, vocab - first))
    own = logits[:, :real].float()
    floor = torch.finfo(torch.float32).min
    top = own.amax(1) if real else own.new_full((len(own),), floor)
    dist.all_reduce(top, op=dist.ReduceOp.MAX, group=tensor.group)
    index = targets - first
    owned = (index >= 0) & (index < real)
    index = torch.where(owned, index, 0)[:, None]
    own -= top[:, None]
    hit = own.gather(1, index).squeeze(1) * owned if real else torch.zeros_like(top)
    total = own.sum(1) if smoothing else torch.zeros_like(top)
    power = own.exp_()
    sums = torch.stack((power.sum(1), hit, total), 1)
    dist.all_reduce(sums, group=tensor.group)
    # All relative to the maximum, which cancels in differences.
    log_sum = sums[:, 0].log()
    nll = log_sum - sums[:, 1]
    lse = log_sum + top
    loss, z = nll, z_loss * lse.square()
    if smoothing:
        loss = (1 - smoothing) * nll + smoothing * (log_sum - sums[:, 2] / vocab)
    if grad:
        slope = power.div_(sums[:, :1])
        if z_loss:
            slope.mul_((1 + 2 * z_loss * lse)[:, None])
        if smoothing:
            slope.sub_(smoothing / vocab)
        if real:
            slope.scatter_add_(1, index, ((smoothing - 1) * owned)[:, None].to(slope.dtype))
        logits[:, :real] = slope.mul_(weights[:, None])
        logits[:, real:] = 0
    return nll, loss + z, z
