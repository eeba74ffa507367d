"""How wrong a model is about tokens and samples, from its head: EL2N and last-layer GraNd.

"Deep Learning on a Data Diet" (Paul, Ganguli and Dziugaite 2021, 2107.07075), definitions 2.1 and
2.2, for one example and one label. A sample of a language model has many labels: its EL2N is
the mean over its tokens, and its GraNd the norm of the gradient of its mean loss.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from llmtrain.loss.cross_entropy import HeadLike

# Rows of the head's weight whose gradient exists at once.
_WORDS = 4096


@dataclass(frozen=True)
class TokenErrors:
    """Of every token, each [b, s] float32: error = ||softmax(logits) - onehot(target)||_2, nll in
    nats and lse, the log-sum-exp of the logits."""

    error: Tensor
    nll: Tensor
    lse: Tensor


@torch.no_grad()
def token_errors(hidden: Tensor, head: HeadLike, targets: Tensor, chunk: int) -> TokenErrors:
    """EL2N and cross-entropy of tokens; only ``chunk`` tokens' logits exist at once.

    hidden: [b, s, d_model]; targets: [b, s] int64. Where the head is split over tensor-parallel
    ranks, each chunk takes two collectives and every rank returns the same numbers.
    """
    x = hidden.reshape(-1, hidden.shape[-1]).to(head.matmul.dtype)
    flat, operand = targets.reshape(-1), head.operand()
    out = torch.empty(3, len(x), dtype=torch.float32, device=x.device)
    for start in range(0, len(x), chunk):
        part = slice(start, start + chunk)
        logits = head.matmul.fprop(x[part], operand, None, head.scale)
        out[:, part] = _errors(logits, flat[part], head)
    error, nll, lse = out.view(3, *targets.shape)
    return TokenErrors(error, nll, lse)


def _errors(logits: Tensor, targets: Tensor, head: HeadLike) -> Tensor:
    """error, nll and lse of a chunk [3, n]; logits [n, own words].

    With m the maximum, e_v = exp(z_v - m) and y the target, sum_v (p_v - onehot_v)^2 =
    sum p^2 - 2 p_y + 1 = (r^2 + q) / (r + e_y)^2 with r = sum_{v != y} e_v and
    q = sum_{v != y} e_v^2: sums over words that ranks can share, and nothing cancels where p_y
    is close to 1.
    """
    first, real = _own_words(head, logits.shape[1])
    own = logits[:, :real].float()
    top = own.amax(1) if real else own.new_full((len(own),), torch.finfo(torch.float32).min)
    if head.tensor is not None:
        dist.all_reduce(top, op=dist.ReduceOp.MAX, group=head.tensor.group)
    index = targets - first
    owned = (index >= 0) & (index < real)
    sums = torch.zeros(3, len(own), dtype=torch.float32, device=own.device)
    if real:
        index = torch.where(owned, index, 0)[:, None]
        power = own - top[:, None]
        sums[2] = power.gather(1, index).squeeze(1) * owned
        power = power.exp_()
        power.scatter_(1, index, power.gather(1, index) * ~owned[:, None])
        sums[0], sums[1] = power.sum(1), power.square_().sum(1)
    if head.tensor is not None:
        dist.all_reduce(sums, group=head.tensor.group)
    rest, squares, hit = sums
    total = rest + hit.exp()
    log_sum = total.log()
    return torch.stack(((rest.square() + squares).sqrt() / total, log_sum - hit, log_sum + top))


def _own_words(head: HeadLike, width: int) -> tuple[int, int]:
    """(first word, number of real words) among the ``width`` rows that this rank has."""
    first = 0 if head.tensor is None else head.tensor.rank * width
    return first, max(0, min(width, head.vocab_size - first))


@torch.no_grad()
def head_gradient_norms(
    hidden: Tensor, head: HeadLike, targets: Tensor, weights: Tensor, chunk: int
) -> Tensor:
    """Norm of the gradient of each sample's loss by the head's weight: [b] float64.

    The loss of sample i is sum_t a_t nll_t, weights a [b, s]. With c the head's constant scale its
    gradient is c sum_t a_t (p_t - onehot_t) h_t^T, of which a slice of words exists at a time. Tied
    embeddings count as a head only. chunk: as in ``token_errors``.
    """
    errors = token_errors(hidden, head, targets, chunk)
    operand, matmul = head.operand(), head.matmul
    assert isinstance(operand, Tensor)  # the head computes in a plain dtype
    first, real = _own_words(head, len(operand))
    squares = torch.zeros(len(hidden), dtype=torch.float64, device=hidden.device)
    for low in range(0, real, _WORDS):
        words = slice(low, min(low + _WORDS, real))
        for i, x in enumerate(hidden.to(matmul.dtype)):
            slope = matmul.fprop(x, operand[words], None, head.scale).float()
            slope = slope.sub_(errors.lse[i, :, None]).exp_()
            index = targets[i] - first - low
            rows = torch.nonzero((index >= 0) & (index < slope.shape[1])).squeeze(1)
            slope[rows, index[rows]] = torch.expm1(-errors.nll[i, rows])  # p_y - 1
            gradient = (slope * weights[i, :, None].float()).t() @ x.float()
            squares[i] += gradient.double().square().sum()
    if head.tensor is not None:
        dist.all_reduce(squares, group=head.tensor.group)
    return head.scale * squares.sqrt()
