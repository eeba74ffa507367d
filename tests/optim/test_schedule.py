"""Schedules against their formulas, and where each begins and ends."""

import itertools
import math

import pytest

from llmtrain.config.schema import ScheduleConfig, dur
from llmtrain.optim import Schedule


def make(name: str, **changes: object) -> Schedule:
    values = {"warmup": 10, "total": 100, "min_factor": 0.1, "decay": 20, **changes}
    return Schedule(name=name, **values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "name", ["constant", "cosine", "linear", "inverse_sqrt", "wsd", "infinite"]
)
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


@pytest.mark.parametrize(
    ("shape", "middle"),
    [
        ("cosine", 0.5 + 0.5 * 0.5 * (1 + math.cos(math.pi * 15 / 30))),
        # a + b / sqrt(1 + t) with 1 at t = 0 and 0.5 at t = 30, solved by hand.
        ("inverse_sqrt", 1 - 0.5 * (1 - 16**-0.5) / (1 - 31**-0.5)),
    ],
)
def test_infinite_cools_down_stays_and_anneals(shape: str, middle: float) -> None:
    schedule = make("infinite", cooldown=30, cooldown_shape=shape, constant_factor=0.5)
    assert schedule.factor(9) == 1.0
    assert schedule.factor(24) == pytest.approx(middle)
    assert {schedule.factor(s) for s in range(39, 80)} == {0.5}
    # eta_const (eta_min / eta_const)^progress, progress 1 at the last update.
    assert schedule.factor(89) == pytest.approx(0.5 * (0.1 / 0.5) ** 0.5)
    assert schedule.factor(99) == pytest.approx(0.1)
    # Another length changes nothing before the annealing: that is what it is for.
    longer = make("infinite", total=500, cooldown=30, cooldown_shape=shape, constant_factor=0.5)
    assert [longer.factor(s) for s in range(80)] == [schedule.factor(s) for s in range(80)]


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd", "inverse_sqrt", "infinite"])
def test_a_restart_is_the_schedule_of_a_run_of_its_own(name: str) -> None:
    parts = {"warmup": 4, "decay": 5, "cooldown": 6, "constant_factor": 0.5}
    cycles = make(name, **parts, restarts=(30, 70))
    alone = [
        make(name, **parts, total=length).factor(s)
        for length in (30, 40, 30)
        for s in range(length)
    ]
    assert [cycles.factor(s) for s in range(100)] == alone


def test_restarts_resolve_against_the_run() -> None:
    cfg = ScheduleConfig(name="cosine", restarts=[dur("0.5dur"), dur("70step")])
    assert Schedule.from_config(cfg, total=100, tokens_per_step=8).restarts == (50, 70)
