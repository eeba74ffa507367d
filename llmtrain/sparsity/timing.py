"""How long the products of a sparse layer take: random numbers under a random mask."""

from __future__ import annotations

from collections.abc import Callable

import torch

from llmtrain.linear import Mask, MaskedMatmul, Packed
from llmtrain.ops.masking import transposable_mask
from llmtrain.sparsity.case import BOTH, Case

# Seconds of a call.
Clock = Callable[[Callable[[], object]], float]


def random_mask(case: Case, device: torch.device) -> Mask:
    """A mask of the case's kind; N:M that no product knows is as any other."""
    gen = torch.Generator().manual_seed(0)
    shape = (case.rows, case.cols)
    if case.semi == BOTH:
        kept = transposable_mask(torch.rand(shape, generator=gen).to(device))
    elif case.semi:
        scores = torch.rand((case.rows, case.cols // 4, 4), generator=gen).to(device)
        kept = (scores.argsort(-1).argsort(-1) < 2).view(shape)
    else:
        grid = (-(-case.rows // case.block[0]), -(-case.cols // case.block[1]))
        kept = (torch.rand(grid, generator=gen) < case.percent / 100).to(device)
    return Mask(kept, case.block, shape)


def stopwatch(
    mask: Mask, dtype: torch.dtype, tokens: int, clock: Clock, *, packs: bool
) -> Callable[[MaskedMatmul], float]:
    """A function that tells how long forward and both gradients take by products under ``mask``.

    packs: with what makes their operand of a weight, as every step on a GPU does; on a CPU the kept
    weights mostly lie as its products read them.
    """
    device = mask.kept.device
    # Of its own: the run's random numbers are the same whether or not anything was timed.
    gen = torch.Generator(device).manual_seed(0)
    weight = torch.randn(mask.shape, device=device, generator=gen)
    rows, cols = mask.shape
    x, grad = (
        Packed(torch.randn(tokens, n, device=device, generator=gen).to(dtype)) for n in (cols, rows)
    )

    def time_of(matmul: MaskedMatmul) -> float:
        packed = None if packs else matmul.operand(weight)

        def work() -> None:
            operand = matmul.operand(weight) if packed is None else packed
            matmul.fprop(x, operand, None)
            matmul.dgrad(grad, operand)
            matmul.wgrad(grad, x)

        return clock(work)

    return time_of
