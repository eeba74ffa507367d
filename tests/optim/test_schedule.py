"""Schedules against their formulas, and where each begins and ends."""

import itertools
import math

import pytest

from llmtrain.config.schema import ScheduleConfig, dur
from llmtrain.optim import Schedule


def make(name: str, **changes: object) -> Schedule:
    values = {"warmup": 10, "total": 100, "min_factor": 0.1, "decay": 20, **changes}
    return Schedule(name=name, **values)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["constant", "cosine", "linear", "inverse_sqrt", "wsd"])
def test_warmup_rises_linearly_to_the_peak(name: str) -> None:
    schedule = make(name)
    assert [schedule.factor(s) for s in range(10)] == pytest.approx(
        [(s + 1) / 10 for s in range(10)]
    )
    assert schedule.factor(10) <= 1.0


def test_cosine_matches_its_formula_in_the_middle_and_ends_at_the_minimum() -> None:
    schedule = make("cosine")
    assert schedule.factor(99) == pytest.approx(0.1)
    assert schedule.factor(54) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 45 / 90)))


def test_linear_ends_at_the_minimum_and_is_straight() -> None:
    schedule = make("linear")
    values = [schedule.factor(s) for s in range(10, 100)]
    steps = {round(a - b, 12) for a, b in itertools.pairwise(values)}
    assert len(steps) == 1
    assert values[-1] == pytest.approx(0.1)


def test_inverse_sqrt_halves_when_the_step_quadruples() -> None:
    schedule = make("inverse_sqrt", total=10**6, min_factor=0.0)
    assert schedule.factor(399) / schedule.factor(1599) == pytest.approx(2.0)
    assert make("inverse_sqrt", min_factor=0.5, total=10**6).factor(10**5) == 0.5


@pytest.mark.parametrize(
    ("shape", "middle"),
    [("linear", 0.55), ("1-sqrt", 0.1 + 0.9 * (1 - math.sqrt(0.5))), ("exponential", 0.1**0.5)],
)
def test_wsd_is_stable_then_decays_in_shape(shape: str, middle: float) -> None:
    schedule = make("wsd", decay_shape=shape)
    assert {schedule.factor(s) for s in range(10, 80)} == {1.0}
    assert schedule.factor(89) == pytest.approx(middle)
    assert schedule.factor(99) == pytest.approx(0.1)


def test_no_update_has_learning_rate_zero_and_none_exceeds_the_peak() -> None:
    for name in ("cosine", "linear", "wsd"):
        schedule = make(name, min_factor=0.0, warmup=0)
        factors = [schedule.factor(s) for s in range(99)]
        assert all(0 < f <= 1 for f in factors)


def test_durations_resolve_against_the_run() -> None:
    cfg = ScheduleConfig(name="wsd", warmup=dur("2048tok"), decay=dur("0.25dur"))
    schedule = Schedule.from_config(cfg, total=80, tokens_per_step=1000)
    assert (schedule.warmup, schedule.decay) == (3, 20)
