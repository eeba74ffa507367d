"""The data plan: phases, caps, its table, and what a resume may change."""

import itertools
import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.tiny import make_corpus

from llmtrain.config.schema import (
    DataConfig,
    PhaseConfig,
    RunConfig,
    SourceConfig,
    TrainConfig,
    dur,
)
from llmtrain.data.phases import RAMP_STEPS, stretches_of
from llmtrain.data.plan import build_plan, plan_report
from llmtrain.errors import DataError

A, B = {"letters": 0.9, "digits": 0.1}, {"letters": 0.3, "digits": 0.7}


def config(corpus: Path, phases: list[tuple[str, dict[str, float], str]], **data: Any) -> RunConfig:
    return RunConfig(
        out=str(corpus.parent),
        train=TrainConfig(duration=dur("100step"), global_batch_size=10),
        data=DataConfig(
            corpus=str(corpus),
            seq_len=32,
            block_size=64,
            phases=[PhaseConfig(dur(until), weights, ramp) for until, weights, ramp in phases],
            **data,
        ),
    )


def two(corpus: Path, later: dict[str, float] = B, **data: Any) -> RunConfig:
    return config(corpus, [("0.8dur", A, "step"), ("1dur", later, "step")], **data)


def test_a_change_at_eighty_percent_repeats_and_drops_nothing(corpus: Path) -> None:
    plan = build_plan(two(corpus), 1000)
    labels, before = plan.mixture.locate_range(0, 1000)
    for index in range(2):
        mine = before[labels == index]
        assert mine.tolist() == list(range(len(mine)))
    at = plan.counts(800)
    assert at.tolist() == [int((labels[:800] == i).sum()) for i in range(2)]
    share = dict(zip(plan.names, plan.counts(1000) - at, strict=True))
    assert share["digits"] == pytest.approx(140, abs=1)


def test_a_ramp_has_the_totals_of_the_straight_line(corpus: Path) -> None:
    cfg = config(corpus, [("0.2dur", A, "step"), ("1dur", B, "linear")])
    stretches = stretches_of(cfg, 10**6)
    assert len(stretches) == 1 + RAMP_STEPS
    assert stretches[-1].stop == 10**6
    for left, right in itertools.pairwise(stretches):
        assert left.stop == right.start
    total = sum((s.stop - s.start) * s.weights["digits"] for s in stretches[1:])
    assert total == Fraction(8, 10) * 10**6 * Fraction(4, 10)
    shares = [s.weights["digits"] for s in stretches]
    assert shares == sorted(shares)


def test_the_table_names_tokens_epochs_and_share(corpus: Path) -> None:
    text = plan_report(two(corpus))
    assert "phase 1: samples 0 to 800" in text
    assert "phase 2: samples 800 to 1,000" in text
    assert "whole run" in text
    assert "90.00%" in text
    assert "70.00%" in text


def test_caps_fail_at_build_time_with_the_numbers(corpus: Path) -> None:
    capped = {"digits": SourceConfig(max_epochs=0.5)}
    with pytest.raises(DataError, match=r"'digits'.*tokens of.*epochs.*max_epochs of 0\.5"):
        build_plan(two(corpus, sources=capped), 1000)
    build_plan(two(corpus, sources={"digits": SourceConfig(max_epochs=1000)}), 1000)


def test_settings_of_a_source_that_is_not_there(corpus: Path) -> None:
    for source in (SourceConfig(loss_weight=2.0), SourceConfig(max_epochs=2)):
        with pytest.raises(DataError, match=r"data\.sources\.digit: has no path.*mean 'digits'"):
            build_plan(two(corpus, sources={"digit": source}), 100)


def test_unknown_sources_and_missing_corpora_are_named(corpus: Path) -> None:
    with pytest.raises(DataError, match=r"'digit'.*did you mean 'digits'"):
        build_plan(two(corpus, {"letters": 0.5, "digit": 0.5}), 1000)
    with pytest.raises(DataError, match=r"no prepared corpus.*data prepare"):
        build_plan(two(corpus.parent / "nowhere"), 1000)


def resumed(old: RunConfig, new: RunConfig, consumed: int) -> Any:
    state = json.loads(json.dumps(build_plan(old, 1000).state()))
    plan = build_plan(new, 1000)
    plan.check_resume(state, consumed)
    return plan


def test_the_future_may_change_and_the_past_stays_bit_for_bit(corpus: Path) -> None:
    old = build_plan(two(corpus), 1000)
    plan = resumed(two(corpus), two(corpus, {"letters": 0.05, "digits": 0.95}), 500)
    for ours, theirs in zip(
        plan.mixture.locate_range(0, 800), old.mixture.locate_range(0, 800), strict=True
    ):
        assert np.array_equal(ours, theirs)
    tail = dict(zip(plan.names, plan.counts(1000) - plan.counts(800), strict=True))
    assert tail["digits"] == pytest.approx(190, abs=1)


def test_a_change_inside_a_block_waits_for_its_end_and_survives_the_next_resume(
    corpus: Path,
) -> None:
    one = config(corpus, [("1dur", A, "step")])
    split = config(corpus, [("0.5dur", A, "step"), ("1dur", B, "step")])
    first = resumed(one, split, 490)
    turn = first.mixture.stretches[1].start
    assert turn == 512
    again = build_plan(split, 1000)
    again.check_resume(json.loads(json.dumps(first.state())), 700)
    assert again.mixture.stretches == first.mixture.stretches
    labels, before = again.mixture.locate_range(0, 1000)
    for index in range(2):
        mine = before[labels == index]
        assert mine.tolist() == list(range(len(mine)))


def test_the_past_may_not_change(corpus: Path) -> None:
    with pytest.raises(DataError, match="800 on, but 900 samples have been seen"):
        resumed(two(corpus), two(corpus, A), 900)
    for change, match in (
        ({"seq_len": 16}, r"data\.seq_len is 16"),
        ({"block_size": 32}, r"data\.block_size=64"),
    ):
        import dataclasses

        new = two(corpus)
        new = dataclasses.replace(new, data=dataclasses.replace(new.data, **change))
        with pytest.raises(DataError, match=match):
            resumed(two(corpus), new, 10)


def test_a_source_may_be_added_but_not_taken_away_or_changed(corpus: Path, tmp_path: Path) -> None:
    other = make_corpus(tmp_path, documents=40, seed=5)
    extra = {"more": SourceConfig(path=str(other / "letters" / "train"))}
    late = {"letters": 0.3, "digits": 0.2, "more": 0.5}
    old = build_plan(two(corpus), 1000)
    plan = resumed(two(corpus), two(corpus, late, sources=extra), 500)
    place = [plan.names.index(name) for name in old.names]
    labels, before = old.mixture.locate_range(0, 800)
    ours = plan.mixture.locate_range(0, 800)
    assert np.array_equal(ours[0], np.array(place)[labels])
    assert np.array_equal(ours[1], before)
    assert plan.counts(1000)[plan.names.index("more")] == pytest.approx(100, abs=1)
    planned_only = resumed(two(corpus, late, sources=extra), two(corpus), 500)
    assert planned_only.names == old.names
    assert planned_only.mixture.counts(1000).sum() == 1000
    with pytest.raises(DataError, match=r"'more'.*no longer configured"):
        resumed(two(corpus, late, sources=extra), two(corpus), 900)
    with pytest.raises(DataError, match="'digits' has changed"):
        changed = {"digits": SourceConfig(path=str(other / "digits" / "train"))}
        resumed(two(corpus), two(corpus, sources=changed), 10)
