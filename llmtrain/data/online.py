"""Mixture weights from held-out losses: formulas and the steps at which they are applied.

Skill-it: Chen et al. 2023 (2307.14430), algorithm 1 and the authors' code. DoReMi: Xie et al. 2023
(2305.10429), algorithm 1; there the weights multiply losses, here they are shares of the samples.

Everything is computed in float64 from losses that lie on a grid, and ends on a grid itself: ranks
that add a loss up in another order differ in its last bits, and must not differ in the weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

from llmtrain.config.schema import RunConfig

# Losses are rounded to 1/1024 nat: far above what the order of a sum changes, far below what the
# choice of held-out sequences does.
LOSS_GRID = 1 << 10
# Weights are multiples of 2^-20, so that their sums over any schedule stay small fractions.
WEIGHT_GRID = 1 << 20

Weights = dict[str, float]
Graph = Mapping[str, Mapping[str, float]]


def update_steps(cfg: RunConfig, total: int) -> range:
    """Updates of the optimizer after which the weights change; ``total``: steps of the run."""
    online = cfg.online
    if online is None:
        return range(0)
    tokens = cfg.train.global_batch_size * cfg.data.seq_len
    every = max(online.every.steps(tokens, total), 1)
    return range(online.start.steps(tokens, total) + every, total, every)


def known_until(cfg: RunConfig, total: int, step: int) -> int | None:
    """Samples whose order is decided after update ``step``; None: all of the run's."""
    later = [s for s in update_steps(cfg, total) if s > step]
    return later[0] * cfg.train.global_batch_size if later else None


def rounded(loss: float) -> float:
    """``loss`` on the grid of losses."""
    return round(loss * LOSS_GRID) / LOSS_GRID


def skill_it(start: Weights, graph: Graph, losses: Sequence[Weights], eta: float) -> Weights:
    """p_i ~ p0_i exp(eta sum_j A_ij sum_t L_j(t)), summing to 1.

    start: p0, the weights that were planned. graph: A_ij, how much training on i helps j; what
    is missing is 0. losses: held-out loss of every source at the latest changes, the window.
    """
    total = {name: math.fsum(one[name] for one in losses) for name in start}
    score = {
        name: eta * math.fsum(edge * total[j] for j, edge in graph.get(name, {}).items())
        for name in start
    }
    return _exponential(start, score)


def doremi(before: Weights, excess: Weights, eta: float, smoothing: float) -> Weights:
    """a_i ~ before_i exp(eta excess_i), then (1 - c) a_i + c / k over the k sources.

    excess: mean over held-out tokens of max(loss - the reference's loss, 0). smoothing: c.
    """
    moved = _exponential(before, {name: eta * excess[name] for name in before})
    return {
        name: (1 - smoothing) * weight + smoothing / len(moved) for name, weight in moved.items()
    }


def _exponential(before: Weights, score: Weights) -> Weights:
    """before_i exp(score_i), normalised."""
    top = max(score.values())
    raw = {name: weight * math.exp(score[name] - top) for name, weight in before.items()}
    total = math.fsum(raw.values())
    return {name: value / total for name, value in raw.items()}


def on_grid(weights: Weights) -> dict[str, Fraction]:
    """Multiples of 2^-20 that sum to 1, each at least one, nearest to ``weights``.

    What rounding down leaves goes to the largest remainders. ``weights`` sum to 1.
    """
    units = {name: max(int(weight * WEIGHT_GRID), 1) for name, weight in weights.items()}
    left = WEIGHT_GRID - sum(units.values())
    order = sorted(weights, key=lambda name: (units[name] - weights[name] * WEIGHT_GRID, name))
    for name in order[: max(left, 0)]:
        units[name] += 1
    # Sources that were raised to one unit are paid for by the largest.
    units[max(units, key=lambda name: (units[name], name))] += min(left, 0)
    return {name: Fraction(count, WEIGHT_GRID) for name, count in units.items()}
