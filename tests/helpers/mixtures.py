"""Weights as exact shares, and a walk over the block boundaries of a mixture."""

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from llmtrain.data.mixture import Mixture


def shares(weights: Sequence[float]) -> dict[str, Fraction]:
    exact = [Fraction(repr(float(w))) for w in weights]
    return {f"s{i:02d}": w / sum(exact) for i, w in enumerate(exact) if w}


def walk(mixture: Mixture) -> tuple[list[Fraction], list[int]]:
    """Worst error by block boundary; and samples dealt to each source while its weight was 0."""
    names, block = mixture.names, mixture.block
    unit = math.lcm(*(w.denominator for s in mixture.stretches for w in s.weights.values()))
    targets, before = [0] * len(names), np.zeros(len(names), np.int64)
    worst, stray = [], [0] * len(names)
    for stretch in mixture.stretches:
        weights = [int(stretch.weights.get(name, 0) * unit) for name in names]
        for low in range(stretch.start, stretch.stop, block):
            high = min(low + block, stretch.stop)
            counts = mixture.counts(high)
            assert counts.sum() == high
            assert (counts >= before).all()
            targets = [t + w * (high - low) for t, w in zip(targets, weights, strict=True)]
            errors = [c * unit - t for c, t in zip(counts.tolist(), targets, strict=True)]
            worst.append(Fraction(max(map(abs, errors)), unit))
            for j, weight in enumerate(weights):
                stray[j] += 0 if weight else int(counts[j] - before[j])
            before = counts
    return worst, stray
