"""Snapshots in memory: killed processes lose a step or two, and no bit."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import warm
from helpers.stored import bits
from helpers.tiny import environment, records, tiny_config

from llmtrain.checkpoint import snapshot
from llmtrain.checkpoint.coordination import Ranks
from llmtrain.checkpoint.snapshot import Snapshots
from llmtrain.cli.main import main
from llmtrain.errors import CheckpointError

STEPS = 12
CHANGES: dict[str, Any] = {
    "train__duration": f"{STEPS}step",
    "eval__every": None,
    "eval__samples": 2,
    "checkpoint__every": "10step",
    "checkpoint__snapshot_every": "1step",
    "average": {"method": "ema"},
}


@pytest.mark.dist
def test_killed_between_checkpoints_goes_on_from_the_last_step(
    tmp_path: Path, corpus: Path
) -> None:
    ranks, memory = 2, tmp_path / "memory"
    memory.mkdir()
    there_instead = (
        "from pathlib import Path; from llmtrain.checkpoint import snapshot\n"
        f"snapshot.SHARED_MEMORY = Path({str(memory)!r})"
    )

    def begun(*words: str) -> warm.Running:
        line = ("train", str(config), *words)
        return warm.start(line, ranks, environment(), 120.0, there_instead)

    config = tiny_config(tmp_path, corpus, **CHANGES)
    assert begun("name=straight").wait().returncode == 0
    assert list(memory.iterdir()) == []
    run = tmp_path / "runs" / "tiny"
    first = begun()
    end = time.monotonic() + 60
    while not there(memory, "rank-0-step-00000007"):
        assert first.runs() and time.monotonic() < end, first.said()
        time.sleep(0.002)
    first.send()
    assert first.wait().returncode == 1
    second = begun().wait()
    assert second.returncode == 0, second.stderr
    (event,) = [e for e in records(run, "event") if "resumed" in e["text"]]
    assert event["text"] == "resumed from a snapshot in memory" and event["step"] >= 6
    last = f"checkpoints/step-{STEPS:08d}"
    assert bits(run / last) == bits(tmp_path / "runs" / "straight" / last)
    assert [r["step"] for r in records(run)] == list(range(1, STEPS + 1))
    assert list(memory.iterdir()) == []


def test_only_whole_snapshots_of_the_same_course_count(tmp_path: Path) -> None:
    state = {"model.w": torch.arange(6.0).reshape(2, 3)}
    alone = Ranks(None)
    kept = Snapshots(tmp_path / "run", alone, {"seed": 1}, tmp_path)
    for step in (3, 4, 5):
        kept.save(step, {k: v + step for k, v in state.items()}, {"guard": step})
    assert kept.newest() == 5 and kept.extra(5) == {"guard": 5}
    assert len(list(kept.folder.glob("*.safetensors"))) == 2
    file = kept.folder / "rank-0-step-00000005.safetensors"
    file.write_bytes(file.read_bytes()[:40])
    assert kept.newest() == 4
    kept.load(4, state)
    assert state["model.w"][1, 2] == 9
    assert Snapshots(tmp_path / "run", alone, {"seed": 2}, tmp_path).newest() is None
    with pytest.raises(CheckpointError, match="another shape"):
        kept.load(4, {"model.w": torch.zeros(3, 2)})
    with pytest.raises(CheckpointError, match="other tensors"):
        kept.load(4, {"model.v": torch.zeros(3, 2)})
    kept.clear()
    assert not kept.folder.exists()


def test_snapshots_of_a_run_that_was_deleted_are_not_of_the_one_begun_anew(
    tmp_path: Path,
    corpus: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    memory = tmp_path / "memory"
    memory.mkdir()
    monkeypatch.setattr(snapshot, "SHARED_MEMORY", memory)
    changes = CHANGES | {"train__duration": "6step", "checkpoint__every": "2step"}
    config, run = tiny_config(tmp_path, corpus, **changes), tmp_path / "runs" / "tiny"
    assert main(["train", str(config), "hooks=[{use: 'helpers.hooks:Stop', args: {at: 6}}]"]) == 130
    assert list(memory.glob("*/*step-00000005*"))
    (kept,) = memory.iterdir()
    kept.rename(tmp_path / "aside")  # on the nodes of the first time
    shutil.rmtree(run)
    assert main(["train", str(config), "hooks=[{use: 'helpers.hooks:Stop', args: {at: 4}}]"]) == 130
    shutil.rmtree(kept)
    (tmp_path / "aside").rename(kept)
    monkeypatch.setattr(snapshot, "save_file", full)
    assert main(["train", str(config)]) == 0
    (event,) = [e for e in records(run, "event") if "resumed" in e["text"]]
    assert event["text"] == "resumed from step-00000002"
    assert "was not written" in capsys.readouterr().err
    assert list(memory.iterdir()) == []


def there(memory: Path, name: str) -> bool:
    """Whether a run has such a snapshot; it takes its folder away when it begins."""
    try:
        return any(memory.glob(f"*/{name}*"))
    except FileNotFoundError:
        return False


def full(*given: Any) -> None:
    raise OSError(28, "No space left on device")
