"""Weights of samples and tokens from their losses: formulas, on tensors of any one process.

Samples: "Dynamic Loss-Based Sample Reweighting for Improved Large Language Model Pretraining"
(Sow et al., ICLR 2025, 2502.06733), section 3, as in the authors' code.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# f of a loss h that lies in [-1, 1] within its batch.
STRATEGIES: dict[str, Callable[[Tensor], Tensor]] = {
    "uniform": torch.zeros_like,
    "linupper": lambda h: (h + 1).clamp(max=1.0),
    "quadratic": lambda h: 1 - h.square(),
    "extremes": lambda h: h.abs(),
    "plain": lambda h: 0.5 * h + 0.5,
}


def centred(losses: Tensor) -> Tensor:
    """Losses [n] mapped linearly to [-1, 1]: h = (2 l - max - min) / max(max - min, 1e-6)."""
    high, low = losses.max(), losses.min()
    return (2 * losses - high - low) / (high - low).clamp(min=1e-6)


def sample_weights(losses: Tensor, strategy: str, temperature: float) -> Tensor:
    """Weights [n] that sum to 1: softmax(f(h) / temperature), without gradient.

    losses: [n] mean cross-entropy of every sample of the *global* batch; NaN marks samples that
    count nothing, whose weight is 0. strategy: a name in ``STRATEGIES``. A large temperature
    approaches 1 / n.
    """
    counted = ~losses.isnan()
    out = torch.zeros_like(losses)
    if counted.any():
        f = STRATEGIES[strategy](centred(losses[counted].detach()))
        out[counted] = torch.softmax(f / temperature, 0)
    return out


def by_surprise(nll: Tensor, gamma: float) -> Tensor:
    """(1 - p)^gamma for tokens of cross-entropy ``nll`` = -log p, in nats, any shape.

    With the model's own p it is the focal factor (Lin et al. 2017, 1708.02002, equation 4), with
    a reference's p the weight falls with what the reference already knows (after PRIOR).
    """
    return (-torch.expm1(-nll)).clamp(min=0.0).pow(gamma)


def excess_threshold(
    excess: Tensor, counts: Tensor, keep: float, total: Callable[[list[float]], list[float]]
) -> float:
    """The smallest excess among the ``keep`` share of tokens with the most, over all ranks.

    excess: [n] float32 of this rank's tokens; counts: [n] bool, which of them count (each token
    on one rank only). total: sums numbers over ranks. At least ``keep`` of the tokens lie at or
    above the result, and fewer above any larger value: bisection over the bits of float32, so
    that no rank ever holds all tokens. Minus infinity where no token counts.
    """
    own = _ordered(excess[counts])
    (number,) = total([float(len(own))])
    wanted = -(-number * keep // 1)
    if number == 0:
        return float("-inf")
    low, high = -(1 << 31), (1 << 31) - 1
    while low < high:  # the largest key that at least ``wanted`` tokens reach
        middle = (low + high + 1) // 2
        (above,) = total([float((own >= middle).sum())])
        low, high = (middle, high) if above >= wanted else (low, middle - 1)
    return float(_unordered(torch.tensor([low])))


def _ordered(values: Tensor) -> Tensor:
    """int64 keys in the order of float32 ``values``."""
    bits = values.float().contiguous().view(torch.int32).long()
    return torch.where(bits >= 0, bits, -(bits & 0x7FFFFFFF))


def _unordered(keys: Tensor) -> Tensor:
    """Inverse of ``_ordered``."""
    bits = torch.where(keys >= 0, keys, (-keys) - (1 << 31))
    return bits.to(torch.int32).view(torch.float32)
