"""Another course under the name of an old run: what the old one recorded and saved is kept."""

import json
from pathlib import Path

import pytest
from helpers.tiny import records, tiny_config

from llmtrain.cli.main import main
from llmtrain.train.aside import set_records_aside


@pytest.fixture
def config(tmp_path: Path, corpus: Path) -> Path:
    return tiny_config(
        tmp_path, corpus, train__duration="4step", checkpoint__every="2step", log__tensorboard=True
    )


def steps_of(folder: Path) -> list[int]:
    return [r["step"] for r in records(folder)]


def test_never_keeps_the_records_and_checkpoints_of_the_old_course(
    tmp_path: Path, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "runs" / "tiny"
    assert main(["train", str(config)]) == 0
    old = (run / "metrics.jsonl").read_bytes()
    capsys.readouterr()
    changes = ["optim.lr=1e-3", "train.stop_after=2step", "checkpoint.every=null"]
    assert main(["train", str(config), "--resume", "never", *changes]) == 0
    out = capsys.readouterr().out
    assert str(run / "abandoned-1") in out and "2 checkpoints" in out

    kept = run / "abandoned-1"
    assert (kept / "metrics.jsonl").read_bytes() == old
    assert "lr: 0.003" in (kept / "config.yaml").read_text()
    assert list((kept / "tensorboard").iterdir()) and list((run / "tensorboard").iterdir())
    assert steps_of(run) == [1, 2]
    assert main(["report", str(kept), str(run), "--out", str(tmp_path / "r.html")]) == 0
    checkpoints = sorted(p.name for p in (run / "checkpoints").glob("*step-*"))
    assert [name[:22] for name in checkpoints] == [
        "abandoned-step-0000000", "abandoned-step-0000000", "step-00000002",
    ]  # fmt: skip
    assert main(["eval", str(next((run / "checkpoints").glob("abandoned-step-00000004*")))]) == 0


def test_going_back_to_a_step_keeps_what_was_recorded_after_it(
    tmp_path: Path, config: Path
) -> None:
    run = tmp_path / "runs" / "tiny"
    assert main(["train", str(config)]) == 0
    old = (run / "metrics.jsonl").read_bytes()
    start = run / "checkpoints" / "step-00000002"
    assert main(["train", str(config), "--resume", str(start), "optim.lr=1e-3"]) == 0
    assert (run / "abandoned-1" / "metrics.jsonl").read_bytes() == old
    assert steps_of(run) == [1, 2, 3, 4]
    before = {r["step"]: r for r in map(json.loads, old.splitlines()) if r["kind"] == "step"}
    assert records(run)[1] == before[2] and records(run)[3]["lr"] != before[4]["lr"]


def test_another_runs_checkpoint_begins_another_course(tmp_path: Path, config: Path) -> None:
    """The old records up to that step are not the past of the run that begins there."""
    for name in ("one", "two"):
        assert main(["train", str(config), f"name={name}"]) == 0
    one, two = tmp_path / "runs" / "one", tmp_path / "runs" / "two"
    start = str(one / "checkpoints" / "step-00000002")
    assert main(["train", str(config), "name=two", "--resume", start]) == 0
    assert steps_of(two / "abandoned-1") == [1, 2, 3, 4]
    assert steps_of(two) == [3, 4]
    assert not (one / "abandoned-1").exists()
    assert main(["train", str(config), "name=two", "--resume", start]) == 0
    assert not (two / "abandoned-2").exists(), "the same command again is the same course"


def test_a_course_that_cannot_begin_leaves_all_as_it_was(
    tmp_path: Path, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(config), "name=wide", "model.d_model=64"]) == 0
    assert main(["train", str(config)]) == 0
    run = tmp_path / "runs" / "tiny"
    names = ("metrics.jsonl", "config.yaml")
    before = [(run / name).read_bytes() for name in names]
    folders = sorted(run.rglob("*step-*"))
    assert main(["train", str(config), "--resume", str(tmp_path / "runs" / "wide")]) == 0
    capsys.readouterr()
    other = str(tmp_path / "runs" / "wide" / "checkpoints" / "step-00000002")
    assert main(["train", str(config), "--resume", other]) == 2
    assert "other shapes" in capsys.readouterr().err
    assert main(["train", str(config), "--resume", "never", "hooks=[{use: nowhere:No}]"]) == 2
    assert [(run / name).read_bytes() for name in names] == before
    assert sorted(run.rglob("*step-*")) == folders


def test_numbers_go_on_and_nothing_is_made_for_nothing(tmp_path: Path) -> None:
    assert set_records_aside(tmp_path, None) is None
    for number in (1, 2):
        (tmp_path / "metrics.jsonl").write_text('{"kind": "step", "step": 3}\n\x00{"step": "x"}\n')
        assert set_records_aside(tmp_path, 3) is None
        assert set_records_aside(tmp_path, None) == tmp_path / f"abandoned-{number}"


def test_nothing_to_do_tells_what_changed(
    tmp_path: Path, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(config)]) == 0
    assert main(["train", str(config)]) == 0
    out = capsys.readouterr().out
    assert "nothing to do" in out and "changed since then" not in out
    assert main(["train", str(config), "optim.lr=0.5", "--resume", "auto"]) == 0
    out = capsys.readouterr().out
    assert "changed since then, without effect: optim.lr: 0.003 -> 0.5" in out
    assert "--resume never" in out
