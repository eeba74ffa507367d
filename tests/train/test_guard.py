"""The guard: what counts as a spike, what each action does, and that its state survives."""

import json
import math

import pytest

from llmtrain.config.upkeep import GuardConfig
from llmtrain.errors import GuardStop
from llmtrain.train.guard import Guard


def steady(guard: Guard, n: int = 40) -> None:
    for i in range(n):
        assert (
            guard.judge(i + 1, 2.0 + 0.01 * (i % 5), 1.0 + 0.02 * (i % 3), "samples").event is None
        )


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("which", ["loss", "norm"])
def test_non_finite_stops_with_exit_code_3_and_names_the_samples(value: float, which: str) -> None:
    guard = Guard(GuardConfig())
    loss, norm = (value, 1.0) if which == "loss" else (2.0, value)
    with pytest.raises(GuardStop, match=r"samples 32\.\.63") as stop:
        guard.judge(2, loss, norm, "samples 32..63")
    assert stop.value.exit_code == 3


def test_non_finite_can_be_skipped_but_not_for_ever() -> None:
    guard = Guard(GuardConfig(nonfinite="skip", max_skips=3))
    assert guard.judge(1, math.nan, 1.0, "s").skip
    assert guard.judge(2, math.nan, 1.0, "s").skip
    with pytest.raises(GuardStop, match="3 updates in a row"):
        guard.judge(3, math.nan, 1.0, "s")


def test_a_good_step_ends_the_row_of_skips() -> None:
    guard = Guard(GuardConfig(nonfinite="skip", max_skips=2))
    for step in range(6):
        assert guard.judge(step, math.nan if step % 2 else 2.0, 1.0, "s").skip == bool(step % 2)


@pytest.mark.parametrize(("action", "skip"), [("count", False), ("skip", True)])
def test_a_spike_beyond_six_sigma_is_seen(action: str, skip: bool) -> None:
    guard = Guard(GuardConfig(spike=action, window=32))
    steady(guard)
    assert guard.judge(41, 2.05, 1.0, "s").event is None
    verdict = guard.judge(42, 9.0, 1.0, "s")
    assert verdict.skip is skip
    assert "sigma" in (verdict.event or "")
    assert guard.spikes == 1


def test_a_skipped_spike_does_not_enter_the_window_but_a_counted_one_does() -> None:
    skipping, counting = (Guard(GuardConfig(spike=a, window=32)) for a in ("skip", "count"))
    for guard in (skipping, counting):
        steady(guard)
        guard.judge(41, 9.0, 1.0, "s")
    assert skipping.judge(42, 4.0, 1.0, "s").event is not None
    assert counting.judge(42, 4.0, 1.0, "s").event is None


def test_gradient_norm_spike_can_stop_and_falls_are_no_spikes() -> None:
    guard = Guard(GuardConfig(spike="stop", window=32))
    steady(guard)
    assert guard.judge(41, 0.1, 0.1, "s").event is None
    steady(guard, 32)
    with pytest.raises(GuardStop, match="gradient norm"):
        guard.judge(42, 2.0, 50.0, "s")


def test_state_survives_json_bit_for_bit() -> None:
    first = Guard(GuardConfig(spike="skip", window=32))
    steady(first, 37)
    second = Guard(GuardConfig(spike="skip", window=32))
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.state_dict() == first.state_dict()
    assert second.judge(38, 9.0, 1.0, "s") == first.judge(38, 9.0, 1.0, "s")
