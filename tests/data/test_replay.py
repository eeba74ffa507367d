"""Replay of an earlier run's sources, and phases that end where the learning rate has fallen."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from helpers.tiny import make_corpus, records, tiny_config

from llmtrain.cli.main import main
from llmtrain.config import load_config
from llmtrain.config.phase_ends import lr_step
from llmtrain.data.plan import build_plan, plan_report
from llmtrain.errors import ConfigError, DataError

STEPS, BATCH, SEQ = 20, 8, 48


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run: 12 steps of letters 0.9, digits 0.1, then 8 of 0.3 and 0.7."""
    folder = tmp_path_factory.mktemp("earlier")
    corpus = make_corpus(folder, documents=40)
    phases = [
        {"until": "12step", "weights": {"letters": 0.9, "digits": 0.1}},
        {"until": "1dur", "weights": {"letters": 0.3, "digits": 0.7}},
    ]
    config = tiny_config(folder, corpus, data__phases=phases, data__block_size=8)
    assert main(["train", str(config)]) == 0
    return folder


def new_config(tmp_path: Path, earlier: Path, **changes: object) -> Path:
    """A run on a source of its own, without the earlier corpus."""
    np.save(tmp_path / "new.npy", np.arange(9000, dtype=np.uint16) % 250)
    return tiny_config(
        tmp_path,
        earlier / "corpus",
        data__corpus=None,
        data__eos_id=256,
        data__phases=None,
        data__weights={"new": 1.0},
        data__sources={"new": {"path": str(tmp_path / "new.npy")}},
        data__replay={"run": str(earlier / "runs" / "tiny"), "fraction": 0.25},
        data__block_size=8,
        model__vocab_size=257,
        **changes,
    )


def test_replay_takes_its_part_as_the_earlier_run_was_mixed(tmp_path: Path, earlier: Path) -> None:
    config = new_config(tmp_path, earlier)
    assert main(["train", str(config)]) == 0
    last = records(tmp_path / "runs" / "tiny")[-1]["sources"]
    letters = Fraction(12 * 9 + 8 * 3, 200)  # of the earlier run's tokens
    wanted = {"new": 120, "letters": 40 * letters, "digits": 40 * (1 - letters)}
    for name, samples in wanted.items():
        assert abs(last[name]["tokens"] // SEQ - samples) < 1
    evals = records(tmp_path / "runs" / "tiny", "eval")[-1]["domains"]
    assert set(evals) == {"letters", "digits"}  # what must not be forgotten is measured
    # The same run goes on, with what it has seen unchanged.
    assert main(["train", str(config), "train.duration=22step", "schedule.name=constant"]) == 0


def test_replay_begins_where_a_branch_does(tmp_path: Path, earlier: Path) -> None:
    base = earlier / "corpus"
    config = tiny_config(
        tmp_path,
        base,
        data__phases=None,
        data__weights={"digits": 1},
        data__replay={"run": str(earlier / "runs" / "tiny"), "fraction": 0.5, "start": "10step"},
    )
    cfg = load_config(config)
    plan = build_plan(cfg, STEPS * BATCH)
    at = plan.names.index("letters")
    assert plan.counts(80)[at] == 0
    assert abs(plan.counts(160)[at] - 80 * 0.5 * 0.66) < 1
    assert "replay of" in plan_report(cfg) and "0.5 of the tokens" in plan_report(cfg)


def test_replay_of_what_cannot_be_replayed_is_refused(tmp_path: Path, earlier: Path) -> None:
    config = new_config(tmp_path, earlier)
    with pytest.raises(DataError, match=r"plan.json is missing"):
        build_plan(load_config(config, [f"data.replay.run={tmp_path}"]), 160)
    clash = [f"data.sources.letters.path={tmp_path / 'new.npy'}"]
    with pytest.raises(DataError, match="give the source here another name"):
        build_plan(load_config(config, clash), 160)
    with pytest.raises(DataError, match="another tokenizer"):
        build_plan(load_config(config, ["model.vocab_size=300"]), 160)
    with pytest.raises(ConfigError, match="keeps a fixed part"):
        load_config(config, ["online.every=5step"])
    with pytest.raises(ConfigError, match="less than 1"):
        load_config(config, ["data.replay.fraction=1"])


@pytest.mark.parametrize("name", ["cosine", "linear", "inverse_sqrt", "wsd"])
def test_a_phase_ends_where_the_learning_rate_has_fallen(
    tmp_path: Path, earlier: Path, name: str
) -> None:
    phases = [
        {"until_lr": 0.5, "weights": {"letters": 1}},
        {"until": "1dur", "weights": {"digits": 1}},
    ]
    config = tiny_config(
        tmp_path,
        earlier / "corpus",
        data__phases=phases,
        schedule={"name": name, "warmup": "2step", "min_factor": 0.1},
        eval__every=None,
    )
    assert main(["train", str(config)]) == 0
    steps = records(tmp_path / "runs" / "tiny")
    peak = load_config(config).optim.lr
    low = [r["step"] for r in steps if r["step"] > 2 and r["lr"] <= 0.5 * peak * (1 + 1e-6)]
    turn = low[0] - 1  # updates made before the first one at half the peak
    for record in steps:
        assert record["sources"]["digits"]["tokens"] == max(record["step"] - turn, 0) * BATCH * SEQ
    text = plan_report(load_config(config))
    assert f"learning rate is at 0.5 of its peak, at step {turn}" in text


def test_the_switch_of_reuse_is_at_a_fifth_of_the_peak() -> None:
    recipe = Path(__file__).parents[2] / "configs" / "recipes" / "reuse-dont-retrain.yaml"
    cfg = load_config(recipe)
    tokens = cfg.train.global_batch_size * cfg.data.seq_len
    total = cfg.train.duration.steps(tokens)
    step = lr_step(cfg, 0.2, total)
    # cosine to a hundredth without warmup: 0.01 + 0.99 (1 + cos(pi x)) / 2 = 0.2
    part = math.acos(2 * 0.19 / 0.99 - 1) / math.pi
    assert abs(step + 1 - part * total) <= 1
    assert cfg.data.phases[0].until_lr == 0.2


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (["data.phases.0.until=0.5dur"], "stands beside data.phases.0.until"),
        (["data.phases.0.until_lr=0.05"], "until_lr 0.05 leaves nothing"),
        (["data.phases.1.until_lr=0.2"], "the last phase ends with the run"),
        (["schedule.restarts=[10step]"], "pass it more than once"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_an_end_by_learning_rate_that_means_nothing_is_refused(
    tmp_path: Path, earlier: Path, changes: list[str], says: str
) -> None:
    phases = [
        {"until_lr": 0.5, "weights": {"letters": 1}},
        {"until": "1dur", "weights": {"digits": 1}},
    ]
    config = tiny_config(tmp_path, earlier / "corpus", data__phases=phases)
    with pytest.raises(ConfigError, match=says):
        load_config(config, changes)
