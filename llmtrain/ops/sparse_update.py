"""AdamW and Lion on packed weights: one pass over what is kept, moments included.

The pass that updates the packed values also writes their transposed copy, and the dense master
weight where one is kept, so that nothing has to be packed again for the next step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmtrain.ops.native import kernels, usable
from llmtrain.ops.sparse import Packed, copy_across, unpack


@dataclass(frozen=True)
class Rule:
    """Hyper-parameters of one update; decay is decoupled (p <- p (1 - lr weight_decay))."""

    lr: float
    betas: tuple[float, float]
    weight_decay: float = 0.0
    eps: float = 1e-8


def _spread(packed: Packed, weight: Tensor | None) -> None:
    packed.values.add_(0.0)  # no -0.0
    copy_across(packed)
    if weight is not None:
        kept = unpack(torch.ones_like(packed.values), packed).bool()
        weight.copy_(torch.where(kept, unpack(packed.values, packed), weight))


def _update(
    packed: Packed,
    grad: Tensor,
    moments: tuple[Tensor, Tensor | None],
    rule: Rule,
    step: int,
    weight: Tensor | None,
) -> None:
    side, (beta1, beta2) = packed.forward, rule.betas
    adam = moments[1] is not None
    rate = rule.lr / (1 - beta1**step) if adam else rule.lr
    root = (1 - beta2**step) ** -0.5 if adam else 1.0
    kernels().sparse_update_(
        *(side.values, packed.backward.values, weight, grad.contiguous(), *moments),
        *(side.starts, side.columns_of, packed.place, side.layout),
        *(1 - rule.lr * rule.weight_decay, beta1, beta2, rate, rule.eps, root),
    )


def adamw_reference_(
    values: Tensor, grad: Tensor, moments: tuple[Tensor, Tensor], rule: Rule, step: int
) -> None:
    """One step of AdamW on float32 tensors of one shape, in place; see ``sparse_adamw_``."""
    (first, second), (beta1, beta2) = moments, rule.betas
    first.lerp_(grad, 1 - beta1)
    second.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    denominator = second.sqrt().mul_((1 - beta2**step) ** -0.5).add_(rule.eps)
    values.mul_(1 - rule.lr * rule.weight_decay)
    values.addcdiv_(first, denominator, value=-rule.lr / (1 - beta1**step))


def sparse_adamw_reference_(
    packed: Packed,
    grad: Tensor,
    moments: tuple[Tensor, Tensor],
    rule: Rule,
    step: int,
    weight: Tensor | None = None,
) -> None:
    """``sparse_adamw_`` in plain PyTorch."""
    adamw_reference_(packed.values, grad, moments, rule, step)
    _spread(packed, weight)


def sparse_adamw_(
    packed: Packed,
    grad: Tensor,
    moments: tuple[Tensor, Tensor],
    rule: Rule,
    step: int,
    weight: Tensor | None = None,
) -> None:
    """One step of AdamW (Loshchilov and Hutter 2019) on ``packed``, in place.

    grad and moments (exp_avg, exp_avg_sq): float32 like ``packed.values``. step: counts from 1.
    weight: float32 [rows, cols] whose kept values follow; the others are left alone.
    """
    if usable(grad):
        _update(packed, grad, moments, rule, step, weight)
    else:
        sparse_adamw_reference_(packed, grad, moments, rule, step, weight)


def sparse_lion_reference_(
    packed: Packed, grad: Tensor, moment: Tensor, rule: Rule, weight: Tensor | None = None
) -> None:
    """``sparse_lion_`` in plain PyTorch."""
    beta1, beta2 = rule.betas
    update = moment.lerp(grad, 1 - beta1).sign_()
    packed.values.mul_(1 - rule.lr * rule.weight_decay).add_(update, alpha=-rule.lr)
    moment.lerp_(grad, 1 - beta2)
    _spread(packed, weight)


def sparse_lion_(
    packed: Packed, grad: Tensor, moment: Tensor, rule: Rule, weight: Tensor | None = None
) -> None:
    """One step of Lion (Chen et al. 2023, 2302.06675, Algorithm 2), as ``sparse_adamw_``."""
    if usable(grad):
        _update(packed, grad, (moment, None), rule, 1, weight)
    else:
        sparse_lion_reference_(packed, grad, moment, rule, weight)
