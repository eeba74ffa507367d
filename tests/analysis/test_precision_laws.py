"""Laws of precision: planted constants come back, and what follows from the law is its own
derivative."""

from __future__ import annotations

import math

import pytest
import torch

from llmtrain.analysis.precision_laws import (
    PrecisionLaw,
    Rounded,
    RoundingLaw,
    Run,
    best_at,
    best_precision,
    explained,
    fit_precision_law,
    fit_rounding_law,
)

# 2411.04330, appendix K, as far as it is known to us; g from memory. Only recovery is tested.
PAPER = PrecisionLaw(4.299e3, 0.4965, 1.806e4, 0.4965, 2.7648, (2.6745, 2.2102, 0.9578))
OTHER = PrecisionLaw(60.0, 0.31, 900.0, 0.42, 1.3, (0.7, 1.9, 3.1))
ROUNDING = RoundingLaw(0.0598, 0.5068, 0.3439, 0.5907)
SIZES, TOKENS = (30e6, 60e6, 110e6, 220e6), (1.5e9, 3e9, 6e9, 13e9, 26e9)


def _bits() -> list[tuple[float, float, float]]:
    full = (16.0, 16.0, 16.0)
    found = [full]
    for kind in range(3):
        found += [(*full[:kind], float(p), *full[kind + 1 :]) for p in (3, 4, 6, 8)]
    return [*found, (4.0, 4.0, 4.0)]


def _runs(law: PrecisionLaw, noise: float = 0.0) -> list[Run]:
    draw = torch.Generator().manual_seed(0)
    grid = [(n, d, p) for n in SIZES for d in TOKENS for p in _bits()]
    errors = (noise * torch.randn(len(grid), generator=draw)).exp().tolist()
    return [Run(n, d, p, law.loss(n, d, p) * e) for (n, d, p), e in zip(grid, errors, strict=True)]


@pytest.mark.parametrize("law", [PAPER, OTHER])
def test_planted_constants_come_back(law: PrecisionLaw) -> None:
    found = fit_precision_law(_runs(law))
    assert (found.a, found.alpha, found.b, found.beta, found.e) == pytest.approx(
        (law.a, law.alpha, law.b, law.beta, law.e), rel=1e-4
    )
    assert found.g == pytest.approx(law.g, rel=1e-4)


def test_noise_and_outliers_move_predictions_little() -> None:
    runs = _runs(PAPER, noise=0.003)
    for i in (3, 77, 150):
        runs[i] = runs[i]._replace(loss=runs[i].loss * 1.5)
    found = fit_precision_law(runs)
    for n, d, p in ((60e6, 6e9, (5.0, 16.0, 16.0)), (500e6, 50e9, (16.0, 16.0, 16.0))):
        assert found.loss(n, d, p) == pytest.approx(PAPER.loss(n, d, p), rel=0.01)
    assert found.g == pytest.approx(PAPER.g, rel=0.1)


def test_the_law_of_rounding_comes_back() -> None:
    points = [
        Rounded(n, d, p, ROUNDING.rise(n, d, p))
        for n in SIZES
        for d in TOKENS
        for p in (3, 4, 5, 6)
    ]
    points.append(Rounded(1e6, 1e6, 3, -0.001))
    outlier = [points[0]._replace(rise=points[0].rise * 30), *points[1:]]
    for given, near in ((points, 1e-6), (outlier, 1e-2)):
        found = fit_rounding_law(given)
        for name in ("c", "gamma_d", "gamma_n", "g"):
            assert getattr(found, name) == pytest.approx(getattr(ROUNDING, name), rel=near), name
    with pytest.raises(ValueError, match="too few"):
        fit_rounding_law(points[-1:] * 9)
    with pytest.raises(ValueError, match="8 runs cannot"):
        fit_precision_law(_runs(PAPER)[:8])


def test_the_best_split_and_precision_are_minima() -> None:
    for compute in (1e18, 1e21):
        best = best_at(PAPER, compute, 6.0)
        assert 6 * best.n * best.d * 6.0 / 16 == pytest.approx(compute)
        for factor in (0.98, 1.02):
            other = PAPER.loss(best.n * factor, best.d / factor, (6.0,) * 3)
            assert other > best.loss
    # Independent of the budget (section 4.3 of the paper), where alpha and beta are equal.
    optima = [best_precision(PAPER, c).bits for c in (1e18, 1e20, 1e24)]
    assert max(optima) - min(optima) <= 0.02 and 2 < optima[0] < 12
    # A law that loses nothing wants as few bits as it may have.
    free = PrecisionLaw(PAPER.a, 0.5, PAPER.b, 0.5, 2.0, (1e-3,) * 3)
    assert best_precision(free, 1e20, lowest=3).bits == 3


def test_more_tokens_hurt_a_rounded_model_beyond_the_critical_number() -> None:
    n, bits = 220e6, 4.0
    d = ROUNDING.critical_tokens(PAPER, n, bits)

    def rounded(tokens: float) -> float:
        return PAPER.loss(n, tokens, (16.0,) * 3) + ROUNDING.rise(n, tokens, bits)

    assert rounded(d) < min(rounded(0.9 * d), rounded(1.1 * d))
    assert RoundingLaw(1.0, -0.1, 0.3, 0.5).critical_tokens(PAPER, n, bits) == math.inf


def test_share_explained() -> None:
    assert explained([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]) == 1.0
    assert explained([1.0, 2.0, 3.0], [2.0, 2.0, 2.0]) == 0.0
