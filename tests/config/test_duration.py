"""Durations: grammar, exact arithmetic, exact text."""

from __future__ import annotations

import random
from fractions import Fraction

import pytest

from llmtrain.config.duration import Duration


@pytest.mark.parametrize(
    ("text", "value", "unit"),
    [
        ("100step", Fraction(100), "step"),
        ("100steps", Fraction(100), "step"),
        ("10K step", Fraction(10_000), "step"),
        ("300Mtok", Fraction(300_000_000), "tok"),
        ("1.5Btok", Fraction(1_500_000_000), "tok"),
        ("2Ttok", Fraction(2 * 10**12), "tok"),
        ("1e6tok", Fraction(10**6), "tok"),
        ("0.8dur", Fraction(4, 5), "dur"),
        ("1e-3dur", Fraction(1, 1000), "dur"),
        ("2/3dur", Fraction(2, 3), "dur"),
        ("1dur", Fraction(1), "dur"),
    ],
)
def test_parse(text: str, value: Fraction, unit: str) -> None:
    assert Duration.parse(text) == Duration(value, unit)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "100",
        "step",
        "5stp",
        "-5step",
        "0.5step",
        "1.5dur",
        "3Mdur",
        "0.5tok",
        "1/0dur",
        "1,000step",
        " ",
        "nan dur",
        "100m tok",
        "1e999tok",
        "٣step",
        "1step2",
        "0x10step",
    ],
)
def test_what_is_no_duration_says_so(text: str) -> None:
    with pytest.raises(ValueError, match=r"duration|whole numbers|suffix|longer than the run"):
        Duration.parse(text)


def test_text_is_exact() -> None:
    rng = random.Random(3)
    cases = [
        Duration(Fraction(rng.randint(0, 10**k)), u) for k in range(16) for u in ("step", "tok")
    ]
    cases += [Duration(Fraction(rng.randint(0, 10**k), 10**k), "dur") for k in range(16)]
    cases += [Duration(Fraction(rng.randint(1, d), d), "dur") for d in range(1, 60)]
    cases += [Duration(Fraction(rng.random()), "dur") for _ in range(20)]
    for duration in cases:
        assert Duration.parse(str(duration)) == duration, str(duration)


def test_lengths_round_up_and_fractions_follow_the_run() -> None:
    assert Duration.parse("1001tok").steps(100) == 11
    assert Duration.parse("1000tok").steps(100) == 10
    assert Duration.parse("0.8dur").steps(100, 1001) == 801  # 800.8
    assert Duration.parse("0.1dur").steps(1, 10) == 1  # floats would give 1 or 2
    assert Duration.parse("0.7dur").samples(seq_len=8, batch=3, total_steps=7) == 15  # 14.7
    assert Duration.parse("17tok").samples(seq_len=8, batch=3) == 3
    assert Duration.parse("5step").samples(seq_len=8, batch=3) == 15
    with pytest.raises(ValueError, match="no length of its own"):
        Duration.parse("0.5dur").steps(100)
