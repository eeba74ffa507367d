"""Masks on dense weights: applied, searched for, and AdamW under them. On a GPU one pass each."""

from __future__ import annotations

from functools import cache
from itertools import combinations, product

import torch
from torch import Tensor

from llmtrain.ops.cuda import cuda_kernels, cuda_usable
from llmtrain.ops.sparse import expand
from llmtrain.ops.sparse_update import Rule, adamw_reference_


@cache
def patterns_24(device: torch.device) -> Tensor:
    """The 90 tiles of 4 x 4 with two kept in every row and column: [90] int32, bit 4 r + c set
    where (r, c) is kept."""
    # As ``sparsity.choose.tile_patterns`` has them: of equal sums the first wins in both.
    rows = [1 << a | 1 << b for a, b in combinations(range(4), 2)]
    tiles = []
    for tile in product(rows, repeat=4):
        if all(sum(row >> c & 1 for row in tile) == 2 for c in range(4)):
            tiles.append(sum(row << 4 * r for r, row in enumerate(tile)))
    return torch.tensor(tiles, dtype=torch.int32, device=device)


def transposable_mask_reference(scores: Tensor) -> Tensor:
    """``transposable_mask`` in plain PyTorch."""
    rows, cols = scores.shape
    patterns = patterns_24(scores.device)
    tiles = scores.view(rows // 4, 4, cols // 4, 4).transpose(1, 2).flatten(2)
    bits = patterns[:, None] >> torch.arange(16, device=scores.device) & 1
    best = bits.bool()[(tiles @ bits.to(scores.dtype).t()).argmax(-1)]
    return best.view(rows // 4, cols // 4, 4, 4).transpose(1, 2).reshape(rows, cols)


def transposable_mask(scores: Tensor) -> Tensor:
    """The 2:4 mask, of rows and of columns, that keeps the most of ``scores``: bool like them.

    scores: float32 [rows, cols], not negative, both multiples of 4. Each 4 x 4 tile gets the
    best of all 90 patterns (Hubara et al. 2021, 2102.08124, search for the same by heuristics).
    """
    if cuda_usable(scores) and scores.dtype == torch.float32:
        patterns = patterns_24(scores.device)
        kept: Tensor = cuda_kernels().transposable_mask(scores.contiguous(), patterns)
        return kept
    return transposable_mask_reference(scores)


def mask_apply_reference_(x: Tensor, kept: Tensor, block: tuple[int, int]) -> Tensor:
    """``mask_apply_`` in plain PyTorch."""
    return x.masked_fill_(~expand(kept, block, x.shape), 0)


def mask_apply_(x: Tensor, kept: Tensor, block: tuple[int, int]) -> Tensor:
    """+0.0 in ``x`` [rows, cols] outside the mask ``kept`` of blocks, in place; returns x."""
    if not cuda_usable(x) or not x.is_contiguous():
        return mask_apply_reference_(x, kept, block)
    cuda_kernels().mask_apply_(x, kept.contiguous(), *block)
    return x


def masked_adamw_reference_(
    weight: Tensor,
    grad: Tensor,
    moments: tuple[Tensor, Tensor],
    mask: tuple[Tensor, tuple[int, int]],
    rule: Rule,
    step: int,
) -> None:
    """``masked_adamw_`` in plain PyTorch."""
    adamw_reference_(weight, grad, moments, rule, step)
    for x in (weight, *moments):
        mask_apply_reference_(x, *mask)


def masked_adamw_(
    weight: Tensor,
    grad: Tensor,
    moments: tuple[Tensor, Tensor],
    mask: tuple[Tensor, tuple[int, int]],
    rule: Rule,
    step: int,
) -> None:
    """One step of AdamW on the kept part of a dense float32 ``weight`` [rows, cols], in place.

    moments: exp_avg, exp_avg_sq like weight; mask: kept blocks and their shape. Weight and
    moments are +0.0 elsewhere, whatever ``grad`` holds there. step counts from 1.
    """
    tensors = (weight, grad, *moments)
    if not cuda_usable(weight) or not all(t.is_contiguous() for t in tensors):
        masked_adamw_reference_(weight, grad, moments, mask, rule, step)
        return
    (kept, block), (beta1, beta2) = mask, rule.betas
    factors = (rule.lr / (1 - beta1**step), rule.eps, (1 - beta2**step) ** -0.5)
    decay = 1 - rule.lr * rule.weight_decay
    cuda_kernels().masked_adamw_(
        *(weight, grad, *moments, kept.contiguous(), *block, decay, beta1, beta2, *factors)
    )
