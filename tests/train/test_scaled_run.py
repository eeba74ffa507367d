"""A run with unit scaling through the commands: dry run, training, evaluation, generation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.tiny import make_corpus, records, tiny_config

from llmtrain.cli.main import main

SCALED = [
    "model.norm_placement=post_branch",
    "model.scaling={parametrization: mus, base_width: 16, tau: 0.3, attention: sqrt}",
    "optim.decoupled=fully",
    "optim.weight_decay=0.001",
    "train.duration=6step",
    "checkpoint.every=3step",
]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scaled")
    return tiny_config(folder, make_corpus(folder, documents=40))


@pytest.fixture(scope="module")
def run(config: Path) -> Path:
    assert main(["train", str(config), *SCALED]) == 0
    return config.parent / "runs" / "tiny"


def test_dry_run_prints_the_factors(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(config), *SCALED, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "scaling (mus, base width 16):" in out and "residual stream: fixed, tau 0.3" in out
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line.strip()}
    assert rows["hidden"][-2:] == ["0.00212", "0.001"]  # 0.003 / sqrt(2) in the groups' table
    assert "0.1768 (of 32), 0.1443 (of 48)" in out and "0.03125 (of 32)" in out


def test_evaluation_and_generation_run_the_same_model(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", str(run), "--json"]) == 0
    domains = json.loads(capsys.readouterr().out)["domains"]
    for name, metrics in records(run, "eval")[-1]["domains"].items():
        assert domains[name]["loss"] == pytest.approx(metrics["loss"], abs=1e-5)
    assert main(["generate", str(run), "--prompt", "alpha "]) == 0
    assert "alpha" in capsys.readouterr().out


def test_a_resumed_run_is_the_same(config: Path, run: Path) -> None:
    whole = [record["loss"] for record in records(run)]
    again = ["name=again", "train.stop_after=3step"]
    assert main(["train", str(config), *SCALED, *again]) == 0
    assert main(["train", str(config), *SCALED, "name=again"]) == 0
    assert [record["loss"] for record in records(run.parent / "again")] == whole


def test_no_architecture_of_transformers_computes_it(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", "to-hf", str(run), str(tmp_path / "hf")]) == 2
    error = capsys.readouterr().err
    assert (
        "model.scaling has attention: sqrt and residual: fixed" in error
        and not (tmp_path / "hf").exists()
    )
