"""The weights are the papers' formulas, written out again in float64 and one by one."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from llmtrain.loss.reweight import STRATEGIES, by_surprise, excess_threshold, sample_weights


def written_out(losses: list[float], strategy: str, r: float) -> list[float]:
    """papers.md section 7, delta = 1, sample by sample."""
    high, low = max(losses), min(losses)
    f = []
    for value in losses:
        h = 2 * value / max(high - low, 1e-6) - (high + low) / max(high - low, 1e-6)
        f.append(
            {
                "uniform": 0.0,
                "linupper": min(h + 1, 1),
                "quadratic": 1 - h**2,
                "extremes": abs(h),
                "plain": 0.5 * h + 0.5,
            }[strategy]
        )
    powers = [math.exp((v - max(f)) / r) for v in f]
    return [p / sum(powers) for p in powers]


@pytest.mark.parametrize("strategy", list(STRATEGIES))
@pytest.mark.parametrize("r", [0.05, 0.4, 1.0, 3.0])
def test_sample_weights_are_the_formula(strategy: str, r: float) -> None:
    draw = np.random.default_rng(3)
    for n in (1, 2, 7, 64):
        losses = draw.gamma(4.0, 1.0, n)
        found = sample_weights(torch.tensor(losses), strategy, r)
        assert found.tolist() == pytest.approx(written_out(losses.tolist(), strategy, r), abs=1e-9)
        assert float(found.sum()) == pytest.approx(1.0, abs=1e-12)


def test_what_each_strategy_prefers() -> None:
    losses = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0], dtype=torch.float64)
    easy, _, middle, _, hard = range(5)
    spared = sample_weights(losses, "linupper", 1.0)
    assert spared[easy] < spared[1] < spared[middle] == spared[hard]
    assert sample_weights(losses, "quadratic", 1.0).argmax() == middle
    ends = sample_weights(losses, "extremes", 1.0)
    assert ends[easy] == ends[hard] > ends[middle]
    assert (sample_weights(losses, "plain", 1.0).diff() > 0).all()


@pytest.mark.parametrize("strategy", list(STRATEGIES))
def test_weights_approach_uniform_as_the_temperature_grows(strategy: str) -> None:
    losses = torch.rand(33, dtype=torch.float64)
    apart = [
        float((sample_weights(losses, strategy, r) - 1 / 33).abs().max()) for r in (1.0, 10.0, 1e6)
    ]
    assert apart[0] >= apart[1] >= apart[2]
    assert apart[2] < 1e-7


def test_equal_losses_and_samples_that_count_nothing() -> None:
    nan = math.nan
    found = sample_weights(torch.tensor([nan, 2.0, 2.0, nan], dtype=torch.float64), "linupper", 1.0)
    assert found.tolist() == [0.0, 0.5, 0.5, 0.0]
    assert sample_weights(torch.full((3,), nan), "plain", 1.0).tolist() == [0.0, 0.0, 0.0]


def test_focal_factor() -> None:
    nll = torch.tensor([[0.0, 1e-4, 0.7], [3.0, 20.0, 200.0]])
    for gamma in (0.0, 0.5, 2.0):
        exact = [[(1 - math.exp(-v)) ** gamma for v in row] for row in nll.double().tolist()]
        torch.testing.assert_close(by_surprise(nll, gamma), torch.tensor(exact), rtol=1e-5, atol=0)


@pytest.mark.parametrize("keep", [0.01, 0.37, 0.6, 1.0])
def test_the_threshold_keeps_the_share_of_all_ranks(keep: float) -> None:
    """Two "ranks" of odd sizes; the sum over ranks is made by hand."""
    torch.manual_seed(0)
    parts = [torch.randn(57), torch.randn(31) * 3]
    counts = [torch.rand(len(p)) < 0.8 for p in parts]
    chosen = torch.cat([p[c] for p, c in zip(parts, counts, strict=True)])
    wanted = math.ceil(len(chosen) * keep)
    exact = float(chosen.sort(descending=True).values[wanted - 1])

    whole = torch.cat(parts), torch.cat(counts)
    assert excess_threshold(*whole, keep, lambda v: v) == exact
    assert int((chosen >= exact).sum()) == wanted


def test_the_threshold_without_tokens_or_with_ties() -> None:
    none = torch.zeros(4, dtype=torch.bool)
    assert excess_threshold(torch.randn(4), none, 0.5, lambda v: v) == -math.inf
    ties = torch.tensor([-1.0, 0.0, -0.0, 0.0])
    assert excess_threshold(ties, ~none, 0.5, lambda v: v) == 0.0
