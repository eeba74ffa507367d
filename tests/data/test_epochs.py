"""Runs whose length is given in epochs."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from llmtrain.cli.main import main
from llmtrain.config import RunConfig, load_config
from llmtrain.config.load import any_length
from llmtrain.data import catalogue
from llmtrain.data.catalogue import Catalogue
from llmtrain.data.epochs import epochs_in_tokens
from llmtrain.errors import ConfigError, DataError

TOKENS, LENGTH, BATCH = 1000, 16, 4


@pytest.fixture
def config(tmp_path: Path) -> Path:
    np.random.default_rng(0).integers(0, 50, TOKENS, dtype=np.uint16).tofile(tmp_path / "a.npy")
    source = {"path": str(tmp_path / "a.npy"), "format": "npy", "dtype": "uint16"}
    model = {"vocab_size": 50, "d_model": 32, "n_layers": 1, "n_heads": 2, "vocab_multiple": 2}
    run: dict[str, Any] = {
        "name": "run",
        "out": str(tmp_path / "runs"),
        "device": "cpu",
        "model": model,
        "data": {"sources": {"a": source, "b": source}, "weights": {"a": 1}, "seq_len": LENGTH},
        "train": {"duration": "2epoch", "global_batch_size": BATCH},
        "log": {"tensorboard": False},
        "eval": {"every": None},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(run))
    return path


@pytest.mark.parametrize(
    ("words", "samples"), [("1epoch", 63), ("3epochs", 189), ("0.5epoch", 31), ("1/63epoch", 4)]
)
def test_whole_steps_that_see_no_sample_too_often(config: Path, words: str, samples: int) -> None:
    cfg = load_config(config, [f"train.duration={words}"], epochs=epochs_in_tokens)
    # 999 predictions are 63 samples, the last one padded.
    assert cfg.train.duration.unit == "tok"
    assert cfg.train.duration.value == samples // BATCH * BATCH * LENGTH


def test_it_is_stored_in_tokens_and_resumes(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(config), "train.stop_after=3step"]) == 0
    capsys.readouterr()
    assert main(["train", str(config)]) == 0
    assert "duration" not in capsys.readouterr().out.split("step ")[0]  # no change of the config
    run = config.parent / "runs/run"
    stored = load_config(run / "config.yaml")
    assert stored.train.duration.value == 31 * BATCH * LENGTH
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert max(line["step"] for line in steps) == 31


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (["data.weights={a: 1, b: 2}"], "has a mixture (a, b)"),
        (["data.weights={}", "data.phases=[{until: 1dur, weights: {a: 1}}]"], "data.phases"),
        (["data.replay={run: earlier}"], "this run has data.replay"),
        (["data.select={mode: random}"], "data.select takes some"),
        (["data.weights={c: 1}"], "there is no source of this name"),
        (["schedule.warmup=1epoch"], "only train.duration counts epochs"),
        (["train.duration=2Kepoch"], "epochs take no suffix 'K'"),
        (["data.sources.a.path=/nowhere.npy"], "/nowhere.npy"),
    ],
)
def test_what_has_no_epochs(config: Path, changes: list[str], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(config, changes, for_training=True, epochs=epochs_in_tokens)
    assert says in str(caught.value)
    assert "run.yaml" in str(caught.value) or "command line" in str(caught.value)


def test_commands_without_data_say_so(config: Path) -> None:
    with pytest.raises(ConfigError, match=r"run.yaml:.*train.duration: 2epoch counts epochs"):
        load_config(config)


@pytest.mark.parametrize(
    ("words", "module"),
    [
        (["train"], "train"),
        (["train", "--dry-run"], "train"),
        (["continual"], "continual"),
        (["sparsity", "lottery"], "sparsity"),
    ],
)
def test_the_process_is_set_up_before_the_data_is_opened(
    words: list[str], module: str, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Setting it up begins the command anew: what was opened before would be opened twice."""
    done: list[str] = []
    command = importlib.import_module(f"llmtrain.cli.{module}")
    monkeypatch.setattr(command, "prepare_process", lambda: done.append("prepared"))

    def opened(cfg: RunConfig) -> Catalogue:
        done.append("opened")
        raise DataError("far enough")

    monkeypatch.setattr(catalogue, "open_catalogue", opened)
    assert main([*words, str(config)]) == 2
    assert done == ["prepared", "opened"]


def test_lottery_takes_epochs(config: Path) -> None:
    heldout = {"path": str(config.parent / "a.npy"), "format": "npy", "dtype": "uint16"}
    words = [
        f"data.heldout={json.dumps({'a': heldout})}",
        "eval.samples=4",
        "schedule.warmup=0.1dur",
    ]
    words += ["lottery={levels: 1, rewind: 2step, points: 0}", "train.duration=0.25epoch"]
    assert main(["sparsity", "lottery", str(config), *words]) == 0
    run = config.parent / "runs/run"
    assert len(json.loads((run / "lottery.json").read_text())) == 2
    assert load_config(run / "config.yaml").train.duration.value == 15 // BATCH * BATCH * LENGTH


def test_preparing_and_scoring_need_no_length(config: Path) -> None:
    cfg = load_config(config, epochs=any_length)
    assert cfg.train.duration.unit == "tok" and cfg.train.duration.value >= 10**15
