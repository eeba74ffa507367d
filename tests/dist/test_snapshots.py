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
from safetensors.torch import load_file

from llmtrain.checkpoint import snapshot
from llmtrain.checkpoint.coordination import Ranks
from llmtrain.checkpoint.scattered import Scattered
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


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in the place of the node's shared memory."""
    folder = tmp_path / "memory"
    folder.mkdir()
    monkeypatch.setattr(snapshot, "SHARED_MEMORY", folder)
    return folder


def short_run(folder: Path, corpus: Path, duration: str) -> tuple[Path, Path]:
    """The config of a run with a checkpoint every second step, and the run's folder."""
    changes = CHANGES | {"train__duration": duration, "checkpoint__every": "2step"}
    return tiny_config(folder, corpus, **changes), folder / "runs" / "tiny"


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

    def save(*steps: int) -> None:
        for step in steps:
            kept.save(step, {k: v + step for k, v in state.items()}, {"guard": step})

    save(3, 4, 5)
    assert kept.newest() == (5, []) and kept.extra(5) == {"guard": 5}
    assert kept.newest(5) == (None, [])
    (file,) = kept.folder.glob("*5-*.safetensors")
    assert load_file(file)["model.w"].tolist() == (torch.arange(6.0) + 5).reshape(2, 3).tolist()
    assert len(list(kept.folder.glob("*.safetensors"))) == 2
    whole = file.read_bytes()
    flipped = bytes([*whole[:-3], whole[-3] ^ 16, *whole[-2:]])
    for damaged in (whole[:40], flipped):
        file.write_bytes(damaged)
        step, (fault,) = kept.newest()
        assert step == 4 and str(file) in fault and "does not fit its checksum" in fault
    loaded = {"model.w": torch.zeros(2, 3)}
    kept.load(4, loaded)
    assert loaded["model.w"][1, 2] == 9
    assert Snapshots(tmp_path / "run", alone, {"seed": 2}, tmp_path).newest(4)[0] is None
    with pytest.raises(CheckpointError, match="another shape"):
        kept.load(4, {"model.w": torch.zeros(3, 2)})
    with pytest.raises(CheckpointError, match="other tensors"):
        kept.load(4, {"model.v": torch.zeros(3, 2)})
    save(4)  # gone on from there: what was damaged is of no use any more
    assert kept.newest() == (4, [])
    save(5, 6)
    assert kept.newest() == (6, []) and len(list(kept.folder.glob("*.safetensors"))) == 2
    kept.clear()
    assert not kept.folder.exists()


def test_what_ranks_hold_is_written_tensor_by_tensor(tmp_path: Path) -> None:
    """Dtypes of all widths, a rank without rows, values of which only the kept are in memory."""
    place = torch.tensor([1, 3])
    kept = torch.tensor([5.0, 7.0])
    scattered = Scattered(kept, (2, 2), lambda v: torch.zeros(4).index_put((place,), v).view(2, 2))
    state: dict[str, Any] = {
        "a": torch.tensor([True, False, True]),
        "b": torch.randn(5, 3).t().bfloat16(),
        "c": torch.empty(0, 4),
        "d": torch.tensor(3),
        "e": scattered,
    }
    snapshots = Snapshots(tmp_path / "run", Ranks(None), {}, tmp_path)
    snapshots.save(1, state, {})
    assert snapshots.newest() == (1, [])
    found = {k: torch.zeros(v.shape, dtype=v.dtype) for k, v in state.items()}
    snapshots.load(1, found)
    for name, value in state.items():
        assert torch.equal(found[name], value.dense() if name == "e" else value), name


def test_a_damaged_snapshot_is_said_and_the_run_goes_on_from_its_checkpoint(
    tmp_path: Path, corpus: Path, memory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, run = short_run(tmp_path, corpus, "5step")
    assert main(["train", str(config), "hooks=[{use: 'helpers.hooks:Stop', args: {at: 4}}]"]) == 130
    (file,) = memory.glob("*/*step-00000003-*")
    bytes_ = bytearray(file.read_bytes())
    bytes_[-1] ^= 1
    file.write_bytes(bytes_)
    assert main(["train", str(config)]) == 0
    assert f"{file} does not fit its checksum" in capsys.readouterr().err
    (event,) = [e for e in records(run, "event") if "resumed" in e["text"]]
    assert event["text"] == "resumed from step-00000002"


def test_snapshots_of_a_run_that_was_deleted_are_not_of_the_one_begun_anew(
    tmp_path: Path,
    corpus: Path,
    memory: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config, run = short_run(tmp_path, corpus, "6step")
    assert main(["train", str(config), "hooks=[{use: 'helpers.hooks:Stop', args: {at: 6}}]"]) == 130
    assert list(memory.glob("*/*step-00000005*"))
    (kept,) = memory.iterdir()
    kept.rename(tmp_path / "aside")  # on the nodes of the first time
    shutil.rmtree(run)
    assert main(["train", str(config), "hooks=[{use: 'helpers.hooks:Stop', args: {at: 4}}]"]) == 130
    shutil.rmtree(kept)
    (tmp_path / "aside").rename(kept)
    monkeypatch.setattr(snapshot, "HashingFile", full)
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
