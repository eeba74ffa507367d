"""Merges of runs: which checkpoint is taken, and searches that cannot be judged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from helpers.tiny import make_corpus, tiny_config
from safetensors.torch import save_file

from llmtrain.cli.main import main
from llmtrain.eval.checkpoint import CheckpointMetrics
from llmtrain.eval.loading import Trained, load_trained
from llmtrain.merge import path, search
from llmtrain.merge.sources import open_source

Printed = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("run")
    config = str(tiny_config(folder, make_corpus(folder, documents=40), data__phases=None))
    changes = ["train.duration=4step", "checkpoint.every=2step", "data.weights={letters: 1}"]
    assert main(["train", config, *changes]) == 0
    return folder / "runs" / "tiny"


@pytest.fixture
def models(run: Path, tmp_path: Path) -> dict[str, str]:
    """good: the run. bad: a copy whose newest checkpoint is damaged. hf: another kind."""
    bad = tmp_path / "bad"
    shutil.copytree(run, bad)
    for file in (bad / "checkpoints" / "step-00000004").glob("model-*.safetensors"):
        damage(file)
    hf = tmp_path / "hf"
    hf.mkdir()
    (hf / "config.json").write_text("{}")
    save_file({"w": torch.ones(3)}, hf / "model.safetensors")
    return {"good": str(run), "bad": str(bad), "hf": str(hf)}


def damage(file: Path) -> None:
    """Flip one bit of the last value."""
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The model of a checkpoint."""
    source = open_source(str(folder))
    return {name: source.whole(name) for name in source.shapes}


@pytest.mark.parametrize("method", ["linear", "greedy-soup", "fisher"])
def test_a_damaged_checkpoint_that_is_passed_over_is_told_and_recorded(
    tmp_path: Path, models: dict[str, str], capfd: Printed, method: str
) -> None:
    line = ["merge", method, models["bad"], models["good"], "--out", str(tmp_path / "out")]
    extra = ["fisher_samples=2"] if method == "fisher" else []
    assert main([*line, *extra]) == 0
    bad, good = (Path(models[n]) / "checkpoints" for n in ("bad", "good"))
    told = [text for text in capfd.readouterr().err.splitlines() if "warning" in text]
    assert len(told) == 1
    assert str(bad / "step-00000004") in told[0]
    assert told[0].endswith(f"; {bad / 'step-00000002'} is used instead")
    recipe = yaml.safe_load((tmp_path / "out" / "merge.yaml").read_text())
    paths = {m["path"] for m in recipe["models"]}
    assert paths <= {str(bad / "step-00000002"), str(good / "step-00000004")}
    if method == "linear":
        assert len(paths) == 2
        merged = weights(tmp_path / "out")
        one, two = weights(bad / "step-00000002"), weights(good / "step-00000004")
        for name, value in merged.items():
            wanted = (one[name].double() + two[name].double()) / 2
            torch.testing.assert_close(value.double(), wanted, rtol=1e-6, atol=1e-7)


def test_the_optimizer_may_be_damaged(tmp_path: Path, run: Path, capfd: Printed) -> None:
    """As evaluation has it, which judges the same models."""
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    for file in (copy / "checkpoints" / "step-00000004").glob("optim*.safetensors"):
        damage(file)
    line = ["merge", "linear", str(copy), str(run), "--out", str(tmp_path / "out")]
    assert main(line) == 0
    assert "warning" not in capfd.readouterr().err
    recipe = yaml.safe_load((tmp_path / "out" / "merge.yaml").read_text())
    assert recipe["models"][0]["path"] == str(copy / "checkpoints" / "step-00000004")


def test_path_tells_of_a_damaged_checkpoint_too(
    tmp_path: Path, models: dict[str, str], capfd: Printed
) -> None:
    line = ["merge", "path", models["good"], models["bad"], "--points", "3"]
    assert main([*line, "--out", str(tmp_path / "out")]) == 0
    older = str(Path(models["bad"]) / "checkpoints" / "step-00000002")
    assert f"{older} is used instead" in capfd.readouterr().err
    assert json.loads((tmp_path / "out" / "path.json").read_text())["second"] == older


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("greedy-soup {good} {good} --search beta=0.1,0.2", "--search: beta: greedy-soup does not"),
        ("greedy-soup {good} {good} --search models.0.weight=1,2", "--search: greedy-soup chooses"),
        ("soup {good} {good} --search method=linear,greedy-soup", "--search: greedy-soup chooses"),
        ("linear {good} {good} --search t=0.5", "--search: t: linear does not read it"),
        ("wise-ft {good} --base {good} --search beta=0.2,1.3", "beta: must be at most 1"),
        ("wise-ft {good} --base {good} --search beta=0.2,abc", "beta: must be a number"),
        ("wise-ft {hf} --base {hf} --search beta=0.2,0.3", "{hf} is not a checkpoint of llmtrain"),
        ("greedy-soup {hf} {hf}", "llmtrain convert from-hf"),
        ("fisher {hf} {hf}", "so its training data nobody knows; convert it with llmtrain convert"),
        ("wise-ft {good} --base {good} --search beta=0.2 --domain zzz",
         "--domain: {good}/checkpoints/step-00000004 has no held-out domain 'zzz'; it has letters"),
        ("linear {good} {good} --domain letters", "--domain: linear looks at no held-out loss"),
        ("fisher {good} {good} --domain letters", "--domain: fisher looks at no held-out loss"),
        ("linear {good} {good} --points 5", "--points: is for path only"),
        ("linear {good} {good} --device cuda", "--device: linear works on the CPU"),
    ],
)  # fmt: skip
def test_what_cannot_be_judged_is_refused_before_anything_is_computed(
    tmp_path: Path,
    models: dict[str, str],
    line: str,
    says: str,
    capfd: Printed,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("merged or evaluated")

    monkeypatch.setattr(search, "merge_models", never)
    monkeypatch.setattr(search, "evaluate_checkpoint", never)
    before = set(tmp_path.iterdir())
    words = [word.format(**models) for word in line.split()]
    assert main(["merge", *words, "--out", str(tmp_path / "out")]) == 2
    said = capfd.readouterr().err
    assert says.format(**models) in said and ".tmp-" not in said
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize("losses", [[float("nan"), 2.0, 1.0], [2.0, float("nan"), 1.0]])
def test_a_loss_that_is_no_number_is_not_the_least(
    tmp_path: Path, models: dict[str, str], losses: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    rest = iter(losses)

    def evaluated(folder: Path, *_: object) -> CheckpointMetrics:
        return CheckpointMetrics(folder, 0, {"letters": {"loss": next(rest)}}, [])

    monkeypatch.setattr(search, "evaluate_checkpoint", evaluated)
    line = ["merge", "wise-ft", models["good"], "--base", models["good"], "--domain", "letters"]
    assert main([*line, "--search", "beta=0.1,0.2,0.3", "--out", str(tmp_path / "out")]) == 0
    assert yaml.safe_load((tmp_path / "out" / "merge.yaml").read_text())["beta"] == 0.3


def test_losses_of_which_none_is_a_number(
    tmp_path: Path, models: dict[str, str], capfd: Printed, monkeypatch: pytest.MonkeyPatch
) -> None:
    def evaluated(folder: Path, *_: object) -> CheckpointMetrics:
        return CheckpointMetrics(folder, 0, {"letters": {"loss": float("nan")}}, [])

    monkeypatch.setattr(search, "evaluate_checkpoint", evaluated)
    out = ["--out", str(tmp_path / "out")]
    good = models["good"]
    before = set(tmp_path.iterdir())
    searched = ["soup", good, good, "--search", "models.0.weight=1,2"]
    for line in (["greedy-soup", good, good], searched):
        assert main(["merge", *line, *out]) == 2
        assert "no held-out loss of these models is a finite number" in capfd.readouterr().err
        assert set(tmp_path.iterdir()) == before


def test_path_names_a_model_that_holds_no_numbers(
    tmp_path: Path, models: dict[str, str], capfd: Printed, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(place: Path, device: torch.device) -> Trained:
        trained = load_trained(place, device)
        if "bad" in str(place):
            next(iter(trained.model.parameters())).data.view(-1)[3] = float("nan")
        return trained

    monkeypatch.setattr(path, "load_trained", broken)
    line = ["merge", "path", models["good"], models["bad"], "--points", "3"]
    assert main([*line, "--out", str(tmp_path / "out")]) == 2
    older = Path(models["bad"]) / "checkpoints" / "step-00000002"
    assert f" in {older} holds values that are NaN" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("how", ["cut", "absent", "text"])
def test_a_damaged_file_is_named_with_what_helps(
    tmp_path: Path, models: dict[str, str], capfd: Printed, how: str
) -> None:
    file = Path(models["hf"]) / "model.safetensors"
    if how == "cut":
        file.write_bytes(file.read_bytes()[:-3])
    elif how == "text":
        file.write_text("no")
    else:
        index = {"weight_map": {"w": "other.safetensors"}}
        (file.parent / "model.safetensors.index.json").write_text(json.dumps(index))
        file = file.with_name("other.safetensors")
    line = ["merge", "linear", models["hf"], models["hf"], "--out", str(tmp_path / "out")]
    assert main(line) == 2
    said = capfd.readouterr().err
    assert str(file) in said and said.endswith("; copy or download that file again\n")
