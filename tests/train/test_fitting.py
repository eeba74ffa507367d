"""Checkpoints that a config names for a run: what does not fit is said before anything is written.

Each case is refused with one sentence that names the key and the file, and leaves no trace.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.tiny import records, tiny_config
from safetensors.torch import load_file, save_file

from llmtrain.checkpoint.layout import CHECKSUMS, checksums_text, read_checksums
from llmtrain.checkpoint.safefile import ALGORITHM, FileSum, hash_bytes
from llmtrain.cli.main import main

SHORT = ["train.duration=4step", "checkpoint.every=2step", "eval.every=4step"]
# Every key that names a checkpoint, as a change to the config.
KEYS = {
    "init.path": "init.path={}",
    "average.anchor": "average={{every: 2step, anchor: '{}'}}",
    "penalty.anchor": "penalty={{strength: 0.1, anchor: '{}'}}",
}
FISHER = "penalty={{kind: ewc, data: {{letters: 1}}, samples: 2, fisher: '{}'}}"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    assert main(["train", str(tiny_config(folder, corpus)), *SHORT]) == 0
    return folder / "runs" / "tiny"


def refused(folder: Path, corpus: Path, capfd: pytest.CaptureFixture[str], *changes: str) -> str:
    """The sentence with which a run is refused that leaves nothing behind."""
    capfd.readouterr()
    assert main(["train", str(tiny_config(folder, corpus)), *SHORT, *changes]) == 2
    assert not (folder / "runs").exists()
    return capfd.readouterr().err


def copy_with(run: Path, to: Path, value: float) -> Path:
    """A run whose newest checkpoint holds ``value`` in one place, with checksums that are right."""
    shutil.copytree(run, to)
    point = to / "checkpoints" / "step-00000004"
    file = next(point.glob("model-*.safetensors"))
    tensors = load_file(file)
    name = sorted(tensors)[-1]
    tensors[name].view(-1)[3] = value
    save_file(tensors, file)
    sums = read_checksums(point)
    sums[file.name] = FileSum(file.name, file.stat().st_size, hash_bytes(file.read_bytes()))
    (point / CHECKSUMS).write_bytes(checksums_text(sums.values()))
    assert ALGORITHM in (point / CHECKSUMS).read_text()
    return to


@pytest.mark.parametrize("key", [*KEYS, "penalty.fisher"])
def test_nothing_there_leaves_nothing_behind(
    tmp_path: Path, corpus: Path, key: str, capfd: pytest.CaptureFixture[str]
) -> None:
    change = KEYS.get(key, FISHER)
    err = refused(tmp_path, corpus, capfd, change.format("nowhere/x"))
    assert f"{key}: nowhere/x does not exist; give a checkpoint" in err
    (tmp_path / "hf").mkdir()
    save_file({"a": torch.ones(1)}, tmp_path / "hf" / "model.safetensors")
    err = refused(tmp_path, corpus, capfd, change.format(tmp_path / "hf"))
    assert f"{key}: " in err and "convert from-hf" in err


def test_an_anchor_is_looked_at_however_late_averaging_starts(
    tmp_path: Path, corpus: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    section = "average={start: 3step, every: 1step, anchor: nowhere/x}"
    assert "average.anchor: nowhere/x" in refused(tmp_path, corpus, capfd, section)


def test_sources_of_the_fisher_information_are_looked_at(
    tmp_path: Path, corpus: Path, plain: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    wrong = FISHER.format(plain).replace("letters", "latters")
    err = refused(tmp_path, corpus, capfd, wrong)
    assert "penalty.data: " in err and "'latters'" in err
    err = refused(tmp_path, corpus, capfd, FISHER.format(plain))
    assert "penalty.fisher: " in err and "penalty.kind=ewc" in err and str(plain) in err


@pytest.mark.parametrize("key", KEYS)
def test_another_tokenizer_is_refused(
    tmp_path: Path, corpus: Path, plain: Path, key: str, capfd: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "tokenizer.json"
    other.write_text(next(corpus.rglob("tokenizer.json")).read_text() + "\n")
    change = KEYS[key].format(plain)
    err = refused(tmp_path, corpus, capfd, change, f"data.tokenizer={other}")
    assert f"{key}: {plain}" in err and "another tokenizer" in err


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize(
    ("change", "says"),
    [
        # The same shapes: 8 heads of 4 and 4 heads of 8.
        ("model={n_heads: 8, n_kv_heads: 4, d_head: 4}", "model.n_heads 4 and this run has 8"),
        ("model.activation=relu", "model.activation swiglu and this run has relu"),
        ("model.position=none", "model.position rope and this run has none"),
        ("model.d_model=64", "model.d_model 32 and this run has 64"),
        ("model.d_ff=56", "model.d_ff 48 and this run has 56"),
        ("model.vocab_size=400", "[320, 32] and this run needs [448, 32]"),
        ("model.mlp_bias=true", "lacks model."),
    ],
)
def test_another_model_is_refused(
    tmp_path: Path,
    corpus: Path,
    plain: Path,
    key: str,
    change: str,
    says: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    err = refused(tmp_path, corpus, capfd, KEYS[key].format(plain), change)
    assert f"{key}: {plain}" in err and says in err


def test_another_activation_between_factors_is_refused(
    tmp_path: Path, corpus: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "one").mkdir()
    words = ["train", str(tiny_config(tmp_path / "one", corpus)), *SHORT]
    assert main([*words, "model.factorized={}"]) == 0
    begins = f"init.path={tmp_path}/one/runs/tiny"
    err = refused(tmp_path, corpus, capfd, begins, "model.factorized={activation: relu}")
    assert "model.factorized.activation gelu and this run has relu" in err


def test_other_rotary_frequencies_are_refused_in_an_anchor_and_said_of_a_beginning(
    tmp_path: Path, corpus: Path, plain: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    theta = "model.rope_theta=500"
    for key in ("average.anchor", "penalty.anchor"):
        err = refused(tmp_path, corpus, capfd, KEYS[key].format(plain), theta)
        assert "model.rope_theta 10000.0 and this run has 500.0" in err
    words = ["train", str(tiny_config(tmp_path, corpus)), *SHORT, f"init.path={plain}", theta]
    assert main(words) == 0
    assert "warning: init.path: " in capfd.readouterr().err


@pytest.mark.parametrize("key", KEYS)
def test_a_model_that_is_not_finite_is_refused(
    tmp_path: Path, corpus: Path, plain: Path, key: str, capfd: pytest.CaptureFixture[str]
) -> None:
    bad = copy_with(plain, tmp_path / "bad", float("nan"))
    err = refused(tmp_path, corpus, capfd, KEYS[key].format(bad))
    assert f"{key}: model." in err and "not finite" in err and ".safetensors" in err


@pytest.mark.parametrize("key", KEYS)
def test_passing_over_a_damaged_checkpoint_is_said(
    tmp_path: Path, corpus: Path, plain: Path, key: str, capfd: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(plain, bad)
    file = next((bad / "checkpoints" / "step-00000004").glob("model-*.safetensors"))
    file.write_bytes(file.read_bytes()[:-7])
    words = ["train", str(tiny_config(tmp_path, corpus)), *SHORT, KEYS[key].format(bad)]
    assert main(words) == 0
    err = capfd.readouterr().err
    assert f"warning: {key}: {file}" in err
    assert f"passed over, {bad / 'checkpoints' / 'step-00000002'} is read" in err


def test_moments_that_are_not_there_are_not_taken_over(
    tmp_path: Path, corpus: Path, plain: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    merged = tmp_path / "merged"
    assert main(["merge", "linear", str(plain), str(plain), "--out", str(merged)]) == 0
    take = [f"init.path={merged}", "init.optimizer=true"]
    err = refused(tmp_path, corpus, capfd, *take)
    assert f"init.path: {merged}" in err and "set init.optimizer=false" in err
    lion = [f"init.path={plain}", "init.optimizer=true", "optim.name=lion"]
    assert "the moments of adamw" in refused(tmp_path, corpus, capfd, *lion)
    frozen = [f"init.path={plain}", "init.optimizer=true", "model.adapters.rank=2"]
    err = refused(tmp_path, corpus, capfd, *frozen)
    assert "set init.optimizer=false" in err and "trains in this run" in err


def test_a_resumed_run_has_its_copies_and_asks_for_no_anchor(
    tmp_path: Path, corpus: Path, plain: Path
) -> None:
    """The anchor is gone after the first part, before averaging has even started."""
    anchor = tmp_path / "anchor"
    words = ["train", str(tiny_config(tmp_path, corpus)), *SHORT]
    words += [f"average={{start: 3step, every: 1step, beta: 1, anchor: '{anchor}'}}"]
    words += [f"penalty={{strength: 0.1, anchor: '{anchor}'}}"]
    shutil.copytree(plain, anchor)
    assert main([*words, "train.stop_after=2step"]) == 0
    shutil.rmtree(anchor)
    assert main(words) == 0
    run = tmp_path / "runs" / "tiny"
    assert len(records(run)) == 4
    end, theirs = (
        load_file(next((r / "checkpoints" / "step-00000004").glob("model-*.safetensors")))
        for r in (run, plain)
    )
    assert end.keys() == theirs.keys()
    # beta 1: the run ends with the anchor.
    assert all(torch.equal(end[name], theirs[name]) for name in end)
    assert json.loads((run / "plan.json").read_text())


def test_a_penalty_that_comes_with_a_resume_is_looked_at(
    tmp_path: Path, corpus: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["train", str(tiny_config(tmp_path, corpus)), *SHORT]
    assert main([*words, "train.stop_after=2step"]) == 0
    metrics = tmp_path / "runs" / "tiny" / "metrics.jsonl"
    before = metrics.read_bytes()
    assert main([*words, KEYS["penalty.anchor"].format("nowhere/x")]) == 2
    assert "penalty.anchor: nowhere/x" in capfd.readouterr().err
    assert metrics.read_bytes() == before
