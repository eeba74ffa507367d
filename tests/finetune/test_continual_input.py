"""What ``llmtrain continual`` says before it trains: the plan, and bad input."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers.sequence import TASKS, THREE, run_sequence, sequence_config
from helpers.tiny import tiny_config

from llmtrain.cli.main import main
from llmtrain.config import load_config
from llmtrain.errors import ConfigError
from llmtrain.finetune.plan import plan_sequence


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A sequence of one task."""
    return run_sequence(tmp_path_factory.mktemp("plain"), corpus, TASKS[:1])


def test_dry_run_says_everything_and_writes_nothing(
    tmp_path: Path, corpus: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = sequence_config(tmp_path, corpus, THREE, method="wise-ft", replay=0.25)
    assert main(["continual", str(file), "--dry-run"]) == 0
    out = capfd.readouterr().out
    assert "2-b: 12 steps, 4,608 tokens" in out and "digits 0.75, letters 0.25" in out
    assert "then wise-ft, beta 0.5 of" in out and "3-c-merged" in out
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("method", "says"),
    [
        ({"method": "sfa"}, "  average: sfa, every 0.25dur, beta 0.5, anchor start"),
        ({"method": "sfa", "p": 0.5, "beta": 0.2}, "sfa, every 0.5dur, beta 0.2, anchor start"),
        ({"method": "ema"}, "  average: ema, every 1step, decay 0.9"),
        ({"method": "latest"}, "  average: latest, every 0.25dur, keep 4"),
        ({"method": "l2"}, "  penalty: l2, strength 0.01, anchor start"),
        ({"method": "ewc"}, "ewc, strength 0.01, anchor start, data letters 1, samples 64"),
        ({"method": "ewc"}, "data digits 1, samples 64, fisher TMP/runs/seq/2-b"),
        ({"method": "task-arithmetic"}, "then task-arithmetic, scale 0.5 of "),
        ({"method": "ties"}, "then ties, scale 0.5, density 0.2 of "),
        ({"optimizer": "keep"}, "1-a and the optimizer's moments"),
    ],
)
def test_dry_run_names_what_the_method_does_in_each_task(
    tmp_path: Path,
    corpus: Path,
    method: dict[str, Any],
    says: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Defaults too: a reader need not know them."""
    file = sequence_config(tmp_path, corpus, THREE, **method)
    assert main(["continual", str(file), "--dry-run"]) == 0
    assert says.replace("TMP", str(tmp_path)) in capfd.readouterr().out


@pytest.mark.parametrize(
    "given", ["data.weights={letters: 1}", "data.phases=[{until: 1dur, weights: {letters: 1}}]"]
)
def test_a_mixture_beside_the_tasks_is_refused(
    tmp_path: Path, corpus: Path, given: str, capfd: pytest.CaptureFixture[str]
) -> None:
    file, key = str(sequence_config(tmp_path, corpus, TASKS)), given.partition("=")[0]
    assert main(["continual", file, given, "--dry-run"]) == 2
    error = capfd.readouterr().err
    assert f"{key}: stands beside continual.tasks" in error and f"set {key}=null" in error
    assert main(["continual", file, given, f"{key}=null", "--dry-run"]) == 0


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ({"tasks": []}, "continual.tasks: is empty"),
        ({"tasks": [TASKS[0], TASKS[0]]}, "continual.tasks.1.name: 'a' comes twice"),
        ({"tasks": [{"name": "a/b", "weights": {"letters": 1}}]}, "cannot name a folder"),
        ({"tasks": [{"name": "a"}]}, "continual.tasks.0.weights: is missing"),
        ({"tasks": [{"name": "a", "weights": {"latters": 1}}]}, "latters"),
        ({"tasks": [{**TASKS[0], "domains": ["prose"]}]}, "no held-out 'prose'"),
        ({"tasks": [{**TASKS[0], "overrides": {"optm": {"lr": 1}}}]}, "did you mean 'optim'"),
        ({"tasks": [{**TASKS[0], "overrides": {"init": {}}}]}, "is set by the sequence"),
        ({"tasks": [{**TASKS[0], "overrides": {"data.weights": {}}}]}, "overrides.data.weights"),
        ({"tasks": [TASKS[0], {**TASKS[1], "trained": "x/y"}]}, "is for the first task only"),
        ({"tasks": [{**TASKS[0], "trained": "no/where"}, TASKS[1]]}, "no/where is not a folder"),
        ({"tasks": TASKS, "method": "sfaa"}, "sfa"),
        ({"tasks": TASKS, "beta": 1.5}, "continual.beta: must be at most 1"),
        ({"tasks": TASKS, "p": 0}, "continual.p: must be more than 0"),
        ({"tasks": TASKS, "replay": 1}, "continual.replay: must be less than 1"),
        ({"tasks": TASKS, "method": "ties", "optimizer": "keep"}, "continual.optimizer: keep"),
    ],
)
def test_bad_input_is_one_sentence(
    tmp_path: Path,
    corpus: Path,
    section: dict[str, Any],
    says: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert main(["continual", str(sequence_config(tmp_path, corpus, **section))]) == 2
    assert says in capfd.readouterr().err
    assert not (tmp_path / "runs").exists()


BAD_TASKS: list[tuple[dict[str, Any], str]] = [
    ({"model.d_model": 64}, "overrides: model.d_model is 64 for task b and 32 for a"),
    ({"model": {"n_heads": 2, "n_kv_heads": 1, "d_head": 16}}, "overrides: model.n_heads is 2"),
    ({"model.rope_theta": 500.0}, "overrides: model.rope_theta is 500.0"),
    ({"optim.name": "lion"}, "overrides: optim.name lion cannot take over the moments"),
    ({"parallel": {"replicate": 3}}, "continual.tasks.1 (b): "),
    ({"data.corpus": "OTHER"}, "continual.tasks.1.overrides: its data has another tokenizer"),
    ({"data.sources": {"digits": {"max_epochs": 0.01}}}, "continual.tasks.1 (b): "),
]


@pytest.mark.parametrize(("own", "says"), BAD_TASKS, ids=lambda v: v if isinstance(v, str) else "")
def test_a_later_task_that_does_not_fit_stops_the_sequence_before_it_begins(
    tmp_path: Path,
    corpus: Path,
    own: dict[str, Any],
    says: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    if own.get("data.corpus") == "OTHER":
        other = shutil.copytree(corpus, tmp_path / "other")
        with (other / "tokenizer.json").open("a") as file:
            file.write("\n")
        own = {"data.corpus": str(other)}
    tasks = [TASKS[0], {**TASKS[1], "overrides": own}]
    file = sequence_config(tmp_path, corpus, tasks, optimizer="keep")
    assert main(["continual", str(file)]) == 2
    assert says in capfd.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("key", ["init.path", "continual.tasks.0.trained"])
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (["model.d_model=64"], "does not fit the config's model: "),
        (["model.n_layers=3"], "is missing there and"),
        (["model.d_head=4", "model.n_heads=8", "model.n_kv_heads=4"], "model.n_heads 4 and"),
        (
            ["model.adapters.rank=2", "continual.method=wise-ft"],
            "has no adapters, and continual.method",
        ),
        ([], "was trained with another tokenizer"),
    ],
    ids=["width", "depth", "heads", "adapters", "tokenizer"],
)
def test_a_refused_beginning_leaves_the_folder_free(
    tmp_path: Path,
    corpus: Path,
    plain: Path,
    key: str,
    changes: list[str],
    says: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Nothing is written, so that the mended command is taken."""
    wrong = list(changes)
    if not changes:
        other = shutil.copytree(corpus, tmp_path / "other")
        with (other / "tokenizer.json").open("a") as file:
            file.write("\n")
        wrong = [f"data.corpus={other}"]
    file = str(sequence_config(tmp_path, corpus, TASKS))
    assert main(["continual", file, f"{key}={plain / '1-a'}", *wrong]) == 2
    error = capfd.readouterr().err
    assert f"{key}: " in error and says in error
    assert not (tmp_path / "runs").exists()
    assert main(["continual", file, f"{key}={plain / '1-a'}", "--dry-run"]) == 0


def test_a_model_without_a_checkpoint_is_refused(
    tmp_path: Path, corpus: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "hf"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"")
    file = str(sequence_config(tmp_path, corpus, TASKS))
    assert main(["continual", file, f"init.path={model}"]) == 2
    assert "llmtrain convert from-hf" in capfd.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_config_without_tasks_is_refused(tmp_path: Path, corpus: Path) -> None:
    plain = load_config(tiny_config(tmp_path, corpus))
    with pytest.raises(ConfigError, match="continual: is missing"):
        plan_sequence(plain)


def test_a_sequence_is_not_a_run(
    tmp_path: Path, corpus: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = str(sequence_config(tmp_path, corpus, TASKS))
    assert main(["train", file]) == 2
    assert "llmtrain continual" in capfd.readouterr().err
    for given, says in (
        (["average={beta: 0.5}"], "average: stands beside continual.method"),
        (["checkpoint.resume=never"], "checkpoint.resume: never does not go"),
        (["init.path=nowhere/x"], "init.path: nowhere"),
    ):
        assert main(["continual", file, *given]) == 2
        assert says in capfd.readouterr().err
