"""Sequences of tasks: identities between methods, the matrix, kills at any point, bad input."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.sequence import STEPS, TASKS, THREE, run_sequence, sequence_config
from helpers.tiny import begun, llmtrain, records
from safetensors.torch import load_file
from torch import Tensor

from llmtrain.cli.main import main
from llmtrain.config import load_config
from llmtrain.finetune import sequence as sequences
from llmtrain.finetune.outcome import numbers
from llmtrain.finetune.plan import mixture, plan_sequence

Weights = dict[str, Tensor]


def tensors(folder: Path) -> Weights:
    """The model tensors of a merged folder, or of a run's last checkpoint."""
    at = folder
    if (folder / "checkpoints").is_dir():
        at = folder / "checkpoints" / f"step-{STEPS:08d}"
    out: Weights = {}
    for file in at.glob("*.safetensors"):
        out.update(load_file(file))
    return {k: v for k, v in out.items() if k.startswith("model.")}


def same(a: Weights, b: Weights) -> bool:
    return a.keys() == b.keys() and all(a[k].numpy().tobytes() == b[k].numpy().tobytes() for k in a)


def result(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "sequence.json").read_text())
    return found


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """Three tasks in sequence, nothing against forgetting."""
    return run_sequence(tmp_path_factory.mktemp("plain"), corpus, THREE)


def test_the_matrix_is_what_the_runs_measured(plain: Path) -> None:
    found = result(plain)
    for i, name in enumerate(("1-a", "2-b", "3-c")):
        last = records(plain / name, "eval")[-1]
        assert last["step"] == STEPS
        losses = {k: v["loss"] for k, v in last["domains"].items()}
        assert found["rows"][i]["losses"] == losses
        assert found["matrix"][i] == [losses["letters"], losses["digits"], losses["letters"]]
    text = (plain / "table.txt").read_text()
    assert f"{found['matrix'][1][0]:.4f}" in text and "backward transfer" in text
    page = (plain / "report.html").read_text()
    assert page.count("<rect") == 9 and f"{found['matrix'][2][1]:.4f}" in page


def test_numbers_are_those_of_the_papers() -> None:
    matrix = [[2.0, 5.0, 6.0], [2.5, 3.0, 6.0], [2.3, 3.6, 1.0]]
    found = numbers(matrix)
    assert found["average_loss"] == pytest.approx((2.3 + 3.6 + 1.0) / 3)
    assert found["forgetting"] == pytest.approx(((2.3 - 2.0) + (3.6 - 3.0)) / 2)
    assert found["backward_transfer"] == pytest.approx(((2.0 - 2.3) + (3.0 - 3.6)) / 2)
    # Forgetting looks back to the best loss, transfer to the one right after the task.
    better = numbers([[2.0, 5.0, 6.0], [1.5, 3.0, 6.0], [1.8, 3.6, 1.0]])
    assert better["forgetting"] == pytest.approx(((1.8 - 1.5) + 0.6) / 2)
    assert better["backward_transfer"] == pytest.approx(((2.0 - 1.8) - 0.6) / 2)
    assert numbers([[2.0]]) == {"average_loss": 2.0, "forgetting": 0.0, "backward_transfer": 0.0}


def test_a_task_begins_with_the_model_of_the_one_before(plain: Path, corpus: Path) -> None:
    """The second task alone, from the first one's checkpoint."""
    again = plain.parent / "alone"
    words = ["train", str(plain / "2-b" / "config.yaml"), f"out={again}"]
    assert main(words) == 0
    assert same(tensors(again / "2-b"), tensors(plain / "2-b"))
    assert not same(tensors(plain / "1-a"), tensors(plain / "2-b"))


def test_beta_0_is_sequential_bit_for_bit(tmp_path: Path, corpus: Path, plain: Path) -> None:
    sfa = run_sequence(tmp_path, corpus, THREE, method="sfa", beta=0.0)
    assert load_config(sfa / "2-b" / "config.yaml").average is not None
    assert same(tensors(sfa / "3-c"), tensors(plain / "3-c"))
    assert result(sfa)["matrix"] == result(plain)["matrix"]


def test_beta_1_stays_at_the_first_task(tmp_path: Path, corpus: Path, plain: Path) -> None:
    sfa = run_sequence(tmp_path, corpus, TASKS, method="sfa", beta=1.0)
    assert same(tensors(sfa / "2-b"), tensors(plain / "1-a"))
    assert result(sfa)["forgetting"] == 0


def test_p_1_is_wise_ft(tmp_path: Path, corpus: Path, plain: Path) -> None:
    sfa = run_sequence(tmp_path / "sfa", corpus, THREE, method="sfa", p=1.0, beta=0.3)
    wise = run_sequence(tmp_path / "wise", corpus, THREE, method="wise-ft", beta=0.3)
    for name, value in tensors(sfa / "3-c").items():
        torch.testing.assert_close(tensors(wise / "3-c-merged")[name], value, rtol=1e-5, atol=1e-7)
    assert same(tensors(wise / "2-b"), tensors(plain / "2-b"))
    for ours, theirs in zip(result(sfa)["matrix"], result(wise)["matrix"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    assert result(wise)["rows"][1]["stored_bytes"] == 2 * sum(
        4 * v.numel() for v in tensors(wise / "2-b").values()
    )


def test_experts_leave_the_first_model_and_are_merged(
    tmp_path: Path, corpus: Path, plain: Path
) -> None:
    found = run_sequence(tmp_path, corpus, THREE, method="task-arithmetic", scale=0.4)
    base, one = tensors(plain / "1-a"), tensors(found / "2-b")
    two, merged = tensors(found / "3-c"), tensors(found / "3-c-merged")
    assert same(one, tensors(plain / "2-b"))
    for name, value in base.items():
        moved = (one[name].double() - value) + (two[name].double() - value)
        wanted = value.double() + 0.4 * moved
        torch.testing.assert_close(merged[name].double(), wanted, rtol=1e-5, atol=1e-7)
    alone = load_config(found / "3-c" / "config.yaml").init
    assert alone is not None and alone.path.endswith("1-a")


METHODS = {
    "ewc": {"method": "ewc", "strength": 1e-4, "samples": 3},
    "l2": {"method": "l2", "strength": 0.3},
    "ties": {"method": "ties", "density": 0.5},
    "model-stock": {"method": "model-stock"},
    "latest": {"method": "latest", "p": 0.25, "keep": 2},
    "ema": {"method": "ema", "decay": 0.5, "optimizer": "keep"},
}


@pytest.mark.parametrize("name", METHODS)
def test_broken_off_anywhere_it_goes_on_to_the_same_end(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Killed after a task's training, and between a merge and its record; nothing runs twice."""
    straight = run_sequence(tmp_path / "a", corpus, THREE, **METHODS[name])
    trained: list[str] = []
    real = sequences.train

    class Kill(BaseException):
        pass

    def train(cfg: Any, world: Any) -> int:
        trained.append(cfg.name)
        code = real(cfg, world)
        if trained == ["1-a", "2-b"]:
            raise Kill
        return code

    monkeypatch.setattr(sequences, "train", train)
    file = sequence_config(tmp_path / "b", corpus, THREE, **METHODS[name])
    with pytest.raises(Kill):
        main(["continual", str(file)])
    write = sequences._write

    def stop(*arguments: Any) -> None:
        monkeypatch.setattr(sequences, "_write", write)
        raise Kill

    monkeypatch.setattr(sequences, "_write", stop)
    with pytest.raises(Kill):
        main(["continual", str(file)])
    assert main(["continual", str(file)]) == 0
    assert trained == ["1-a", "2-b", "3-c"]
    broken = tmp_path / "b" / "runs" / "seq"
    assert result(broken)["matrix"] == result(straight)["matrix"]
    model = "3-c-merged" if (straight / "3-c-merged").exists() else "3-c"
    assert same(tensors(broken / model), tensors(straight / model))


def test_a_killed_process_goes_on_across_a_merge(tmp_path: Path, corpus: Path) -> None:
    """SIGKILL in the middle of a task, after a merge of SFA; the end is the same, bit for bit."""
    method = {"method": "sfa", "p": 0.25, "beta": 0.4}
    slow = [dict(task, overrides={"checkpoint": {"every": "1step"}}) for task in TASKS]
    straight = run_sequence(tmp_path / "a", corpus, slow, **method)
    file = sequence_config(tmp_path / "b", corpus, slow, **method)
    broken = tmp_path / "b" / "runs" / "seq"
    process = begun("continual", str(file))
    deadline = time.monotonic() + 60
    while not list((broken / "2-b" / "checkpoints").glob("step-0000000[4-9]")):
        assert time.monotonic() < deadline and process.runs()
        time.sleep(0.005)
    os.kill(process.pids[0], signal.SIGKILL)
    process.wait()
    assert main(["continual", str(file)]) == 0
    assert same(tensors(broken / "2-b"), tensors(straight / "2-b"))
    merges = [r["step"] for r in records(broken / "2-b", "event") if "merged" in r["text"]]
    assert merges == [3, 6, 9, 12]
    assert any("resumed" in r["text"] for r in records(broken / "2-b", "event"))


@pytest.mark.dist
def test_two_ranks_measure_the_same(tmp_path: Path, corpus: Path) -> None:
    method = {"method": "wise-ft", "beta": 0.4}
    alone = run_sequence(tmp_path / "a", corpus, TASKS, **method)
    file = sequence_config(tmp_path / "b", corpus, TASKS, **method)
    done = llmtrain("continual", str(file), ranks=2)
    assert done.returncode == 0, done.stderr
    for ours, theirs in zip(
        result(tmp_path / "b" / "runs" / "seq")["matrix"], result(alone)["matrix"], strict=True
    ):
        assert ours == pytest.approx(theirs, rel=2e-5)
    assert done.stdout.count("report: ") == 1
    again = llmtrain("continual", str(file), ranks=2)
    assert again.returncode == 0 and "task 2 of 2, b: done" in again.stdout
    wrong = llmtrain("continual", str(file), "optim.lr=1e-5", ranks=2)
    assert "other settings (optim.lr" in wrong.stderr


def test_tasks_may_be_added_and_nothing_else_changed(
    tmp_path: Path, corpus: Path, plain: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_sequence(tmp_path, corpus, TASKS)
    more = run_sequence(tmp_path, corpus, THREE)
    assert "task 2 of 3, b: done" in capfd.readouterr().out
    assert result(more)["matrix"] == result(plain)["matrix"]
    assert main(["continual", str(sequence_config(tmp_path, corpus, THREE)), "log.every=5"]) == 0
    assert main(["continual", str(sequence_config(tmp_path, corpus, THREE, replay=0.5))]) == 2
    assert "continual.replay: 0.0 -> 0.5" in capfd.readouterr().err


def test_replay_is_a_share_of_the_mixture(tmp_path: Path, corpus: Path) -> None:
    tasks = [*TASKS, {"name": "c", "weights": {"letters": 3, "digits": 1}}]
    planned = plan_sequence(load_config(sequence_config(tmp_path, corpus, tasks, replay=0.2)))
    wanted = [{"letters": 1.0}, {"digits": 0.8, "letters": 0.2}, {"letters": 0.7, "digits": 0.3}]
    for i, (stage, shares) in enumerate(zip(planned.stages, wanted, strict=True)):
        assert stage.cfg.data.weights == pytest.approx(shares)
        assert mixture(planned.section, i) == stage.cfg.data.weights


def test_ewc_carries_information_from_task_to_task(tmp_path: Path, corpus: Path) -> None:
    planned = plan_sequence(load_config(sequence_config(tmp_path, corpus, THREE, method="ewc")))
    first, second, third = (stage.cfg.penalty for stage in planned.stages)
    assert first is None and second is not None and third is not None
    assert (second.data, second.fisher) == ({"letters": 1.0}, None)
    assert (third.data, third.fisher) == ({"digits": 1.0}, str(planned.stages[1].run))


def test_a_pretrained_model_is_kept_from_the_first_task_on(tmp_path: Path, corpus: Path) -> None:
    file = sequence_config(tmp_path, corpus, TASKS, method="sfa")
    for given, acts in ((["init.path=some/run"], True), ([], False)):
        planned = plan_sequence(load_config(file, given))
        assert (planned.stages[0].cfg.average is not None) == acts
        assert planned.stages[1].cfg.average is not None


@pytest.mark.parametrize("method", ["sequential", "task-arithmetic"])
def test_the_first_task_may_be_trained_already(
    tmp_path: Path, corpus: Path, plain: Path, method: str
) -> None:
    """The same matrix, without training the first task again."""
    given = [{**THREE[0], "trained": str(plain / "1-a")}, *THREE[1:]]
    found = run_sequence(tmp_path / "a", corpus, given, method=method)
    whole = plain
    if method != "sequential":
        whole = run_sequence(tmp_path / "b", corpus, THREE, method=method)
    for ours, theirs in zip(result(found)["matrix"], result(whole)["matrix"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6)
    assert not (found / "1-a").exists()
    assert same(tensors(found / "3-c"), tensors(whole / "3-c"))


def test_an_infinite_schedule_stays_constant_between_tasks(tmp_path: Path, corpus: Path) -> None:
    file = sequence_config(tmp_path, corpus, THREE)
    schedule = "schedule={name: infinite, warmup: 2step, cooldown: 4step, decay: 3step}"
    planned = plan_sequence(load_config(file, [schedule]))
    from llmtrain.optim import Schedule

    factors = [
        [Schedule.from_config(s.cfg.schedule, STEPS, 1).factor(i) for i in range(STEPS)]
        for s in planned.stages
    ]
    assert factors[0][:2] == [0.5, 1.0] and factors[0][6:] == [0.55] * 6
    assert factors[1] == [0.55] * STEPS
    assert factors[2][:9] == [0.55] * 9 and factors[2][11] == pytest.approx(0.1)


INFINITE = "schedule={name: infinite, warmup: 2step, cooldown: 4step, decay: 3step}"


@pytest.mark.parametrize("method", [{}, {"method": "wise-ft"}, {"method": "ewc", "samples": 3}])
def test_a_grown_sequence_is_one_that_was_known(
    tmp_path: Path, corpus: Path, method: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    """Task by task with an infinite schedule: the models of all tasks at once, bit for bit."""
    known = sequence_config(tmp_path / "known", corpus, THREE, **method)
    assert main(["continual", str(known), INFINITE]) == 0
    grown = tmp_path / "grown"
    for count in (1, 2, 3):
        file = sequence_config(grown, corpus, THREE[:count], **method)
        assert main(["continual", str(file), INFINITE]) == 0
    one, two = (folder / "runs" / "seq" for folder in (tmp_path / "known", grown))
    assert same(tensors(one / "1-a"), tensors(two / "1-a-constant"))
    assert same(tensors(one / "2-b"), tensors(two / "2-b-constant"))
    last = "3-c-merged" if method.get("method") == "wise-ft" else "3-c"
    assert same(tensors(one / last), tensors(two / last))
    assert result(one)["matrix"] == result(two)["matrix"]
    assert [r["step"] for r in records(two / "2-b-constant")] == [10, 11, 12]
    capfd.readouterr()
    # Nothing is trained twice, nor needed twice.
    shutil.rmtree(two / "2-b")
    assert main(["continual", str(file), INFINITE]) == 0
    assert "task 3 of 3, c: done" in capfd.readouterr().out


def test_growth_broken_off_before_it_was_measured(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The row of the annealed model does not pass for the one at the constant rate."""
    known = sequence_config(tmp_path / "known", corpus, TASKS)
    assert main(["continual", str(known), INFINITE]) == 0
    short = sequence_config(tmp_path / "b", corpus, TASKS[:1])
    assert main(["continual", str(short), INFINITE]) == 0

    class Kill(BaseException):
        pass

    def stop(*arguments: Any) -> None:
        raise Kill

    file = sequence_config(tmp_path / "b", corpus, TASKS)
    with monkeypatch.context() as patch:
        patch.setattr(sequences, "_write", stop)
        with pytest.raises(Kill):
            main(["continual", str(file), INFINITE])
    assert main(["continual", str(file), INFINITE]) == 0
    ours, wanted = (result(tmp_path / f / "runs" / "seq")["matrix"] for f in ("b", "known"))
    assert ours == wanted


def test_without_the_checkpoint_before_the_annealing_growth_is_explained(
    tmp_path: Path, corpus: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = sequence_config(tmp_path, corpus, TASKS[:1])
    assert main(["continual", str(file), INFINITE]) == 0
    saved = tmp_path / "runs" / "seq" / "1-a" / "checkpoints"
    for step in (5, 9):
        shutil.rmtree(saved / f"step-{step:08d}")
    file, trunk = sequence_config(tmp_path, corpus, TASKS), tmp_path / "runs" / "seq" / "1-a"
    assert main(["continual", str(file), INFINITE]) == 2
    says = f"checkpoint of step 9, before that, is gone; delete {trunk}, and"
    assert says in capfd.readouterr().err
    shutil.rmtree(trunk)
    assert main(["continual", str(file), INFINITE]) == 0
    assert not trunk.with_name("1-a-constant").exists()


def test_overrides_of_a_task(tmp_path: Path, corpus: Path) -> None:
    own = {"optim.lr": 1e-5, "schedule": {"name": "constant"}, "schedule.warmup": "3step"}
    tasks = [TASKS[0], {**TASKS[1], "overrides": own, "duration": "7step"}]
    cfg = plan_sequence(load_config(sequence_config(tmp_path, corpus, tasks))).stages[1].cfg
    assert (cfg.optim.lr, cfg.schedule.name) == (1e-5, "constant")
    assert str(cfg.schedule.warmup) == "3step" and str(cfg.train.duration) == "7step"


RECIPES = sorted((Path(__file__).parents[2] / "configs" / "recipes").glob("continual*.yaml"))


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_shipped_recipes_have_a_plan(file: Path) -> None:
    planned = plan_sequence(load_config(file))
    assert len(planned.stages) >= 2
    assert planned.stages[1].cfg.init is not None


def test_report_of_a_sequence_points_to_its_own(
    plain: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = (plain / "report.html").read_text()
    assert main(["report", str(plain)]) == 2
    assert "a sequence of tasks" in capfd.readouterr().err
    assert (plain / "report.html").read_text() == before
    assert main(["report", str(plain / "2-b")]) == 0
