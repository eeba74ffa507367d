"""Saving and loading in one process: values, meta data, bounded asynchrony, what does not fit."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from llmtrain.checkpoint import (
    Checkpointer,
    SafetensorsReader,
    SafetensorsWriter,
    latest,
    load_checkpoint,
    read_files,
    safefile,
    scan,
    verify,
)
from llmtrain.config.upkeep import CheckpointConfig
from llmtrain.errors import CheckpointError

SYNC = CheckpointConfig(asynchronous=False, keep=2)
ASYNC = CheckpointConfig(asynchronous=True, keep=2)


def state(number: int = 1) -> dict[str, torch.Tensor]:
    value = float(number)
    return {
        "model.embed.weight": torch.full((13, 7), value),
        "model.norm.weight": torch.full((7,), value, dtype=torch.bfloat16),
        "optim.embed.weight.exp_avg": torch.full((13, 7), -value),
        "optim.embed.weight.step": torch.tensor(value),
        "optim.count": torch.tensor(number),
    }


def zeros() -> dict[str, torch.Tensor]:
    return {key: torch.zeros_like(value) for key, value in state().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("cfg", [SYNC, ASYNC])
def test_state_and_files_come_back(tmp_path: Path, cfg: CheckpointConfig) -> None:
    checkpoints = Checkpointer(tmp_path / "checkpoints", cfg)
    assert checkpoints.latest() is None and checkpoints.resolve("auto").path is None
    files = {"config.yaml": "seed: 1\n", "tokenizer.json": b"\x00\xff"}
    checkpoints.save(12, state(3), files, meta={"tokens": 1234}, permanent=True)
    saved = checkpoints.wait()
    assert saved is not None and saved.path == checkpoints.latest()
    assert saved.bytes == sum(
        f.stat().st_size for f in saved.path.iterdir() if f.name != "checksums.json"
    )
    target = zeros()
    target["model.embed.weight"].requires_grad_()
    checkpoints.load(saved.path, target)
    assert same(target, state(3))
    contents = read_files(saved.path)
    meta = json.loads(contents.pop("meta.json"))
    assert contents == {"config.yaml": b"seed: 1\n", "tokenizer.json": b"\x00\xff"}
    assert {k: meta[k] for k in ("step", "tokens", "world_size", "permanent")} == {
        "step": 12, "tokens": 1234, "world_size": 1, "permanent": True,
    }  # fmt: skip
    assert verify(saved.path) == []
    checkpoints.close()


def test_no_pickle_on_disk(tmp_path: Path) -> None:
    checkpoints = Checkpointer(tmp_path, SYNC)
    checkpoints.save(1, state(), {"config.yaml": "a: 1"})
    names = sorted(p.name for p in (tmp_path / "step-00000001").iterdir())
    assert {Path(name).suffix for name in names} == {".safetensors", ".json", ".yaml"}
    for path in (tmp_path / "step-00000001").glob("*.json"):
        json.loads(path.read_bytes())


def test_an_asynchronous_save_keeps_the_values_of_its_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()
    real = safefile.HashingFile.write

    def slow(self: safefile.HashingFile, data: bytes | memoryview) -> None:
        assert gate.wait(20)
        real(self, data)

    monkeypatch.setattr(safefile.HashingFile, "write", slow)
    checkpoints = Checkpointer(tmp_path, ASYNC)
    live = state(5)
    checkpoints.save(1, live)
    assert checkpoints.busy and checkpoints.poll() is None and checkpoints.busy
    assert latest(tmp_path) is None, "nothing is visible before it is complete"
    for tensor in live.values():
        tensor.fill_(9)
    gate.set()
    saved = checkpoints.wait()
    assert saved is not None and saved.stall_seconds <= saved.seconds and not checkpoints.busy
    target = zeros()
    checkpoints.load(saved.path, target)
    assert same(target, state(5))
    checkpoints.close()


def test_at_most_one_save_and_one_copy_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second save copies nothing before the first is on the disk and its copy is free."""
    from llmtrain.checkpoint import checkpointer as module

    log: list[str] = []
    real_stage, real_finish = module.stage, safefile.HashingFile.finish

    def stage(*args: object) -> object:
        log.append("copy")
        assert all(s._source._copies == {} for s in saves)
        return real_stage(*args)  # type: ignore[arg-type]

    saves: list[module.Save] = []
    real_start = module.Save.start

    def start(self: module.Save, ranks: object) -> None:
        saves.append(self)
        real_start(self, ranks)  # type: ignore[arg-type]

    def finish(self: safefile.HashingFile) -> safefile.FileSum:
        done = real_finish(self)
        if self.path.name == "checksums.json":
            log.append("done")
        return done

    monkeypatch.setattr(module, "stage", stage)
    monkeypatch.setattr(module.Save, "start", start)
    monkeypatch.setattr(safefile.HashingFile, "finish", finish)
    checkpoints = Checkpointer(tmp_path, ASYNC)
    for step in (1, 2, 3):
        checkpoints.save(step, state(step))
    checkpoints.close()
    assert log == ["copy", "done"] * 3
    assert [c.step for c in scan(tmp_path)] == [2, 3]


def test_an_unchanged_model_is_planned_once(tmp_path: Path) -> None:
    checkpoints = Checkpointer(tmp_path, SYNC)
    checkpoints.save(1, state(1))
    plan = checkpoints._plan
    checkpoints.save(2, state(2))
    assert checkpoints._plan is plan
    checkpoints.save(3, state(3) | {"model.new": torch.ones(2)})
    assert checkpoints._plan is not plan
    target = zeros()
    checkpoints.load(tmp_path / "step-00000003", target, unused=("model.new",))
    assert same(target, state(3))
    checkpoints.load(tmp_path / "step-00000002", target)
    assert same(target, state(2))


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    checkpoints = Checkpointer(tmp_path, SYNC)
    checkpoints.save(1, state(1))
    checkpoints.save(1, state(2))
    target = zeros()
    checkpoints.load(tmp_path / "step-00000001", target)
    assert same(target, state(2))
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "step-00000001"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model.extra": torch.ones(2)}, "lacks tensors this run needs: model.extra"),
        ({"optim.count": None}, "holds tensors this run has not: optim.count"),
        ({"model.norm.weight": torch.ones(8)}, "stored [7], wanted [8]"),
        ({"optim.count": torch.tensor(1.5)}, "stored torch.int64, wanted torch.float32"),
    ],
)
def test_what_does_not_fit_is_named(
    tmp_path: Path, change: dict[str, torch.Tensor | None], words: str
) -> None:
    checkpoints = Checkpointer(tmp_path, SYNC)
    checkpoints.save(1, state())
    target = {k: v for k, v in {**zeros(), **change}.items() if v is not None}
    with pytest.raises(CheckpointError) as caught:
        checkpoints.load(tmp_path / "step-00000001", target)
    assert words in str(caught.value) and "step-00000001" in str(caught.value)


def test_part_of_a_checkpoint_and_other_dtypes_on_request(tmp_path: Path) -> None:
    checkpoints = Checkpointer(tmp_path / "checkpoints", SYNC)
    checkpoints.save(1, state(1))
    checkpoints.save(2, state(2))
    target = {"model.embed.weight": torch.zeros(13, 7, dtype=torch.bfloat16)}
    # The run still holds its lock: readers need none.
    unused = ("optim.", "model.norm")
    path = load_checkpoint(tmp_path, target, unused=unused, cast=True)
    assert path.name == "step-00000002"
    assert torch.equal(target["model.embed.weight"], torch.full((13, 7), 2.0).bfloat16())
    with pytest.raises(CheckpointError, match="holds other dtypes"):
        load_checkpoint(path, target, unused=unused)


def test_a_tensor_that_cannot_be_stored_is_named(tmp_path: Path) -> None:
    checkpoints = Checkpointer(tmp_path, SYNC)
    with pytest.raises(CheckpointError, match=r"model\.odd has dtype torch\.complex128"):
        checkpoints.save(1, {"model.odd": torch.ones(2, dtype=torch.complex128)})
    assert [p.name for p in tmp_path.iterdir()] == [".lock"]


def test_many_digits_and_strided_tensors(tmp_path: Path) -> None:
    checkpoints = Checkpointer(tmp_path, ASYNC)
    live = torch.arange(12.0).reshape(3, 4)
    views = {
        "model.t": live.t(),
        "model.column": live[:, 1],
        "model.expanded": live[:1].expand(5, 4),
    }
    checkpoints.save(123_456_789_0, views)
    checkpoints.wait()
    target = {k: torch.zeros(v.shape) for k, v in views.items()}
    assert load_checkpoint(tmp_path, target).name == "step-1234567890"
    assert all(torch.equal(target[k], v) for k, v in views.items())


def test_resume_choices(tmp_path: Path) -> None:
    run = tmp_path / "run"
    checkpoints = Checkpointer(run / "checkpoints", CheckpointConfig(asynchronous=False, keep=9))
    with pytest.raises(CheckpointError, match="holds no checkpoint that can be used"):
        checkpoints.resolve(str(run))
    for step in (5, 10, 15):
        checkpoints.save(step, state(step))
    assert checkpoints.resolve("never").path is None
    fifteen = run / "checkpoints" / "step-00000015"
    for words in ("auto", str(run), str(run / "checkpoints"), str(fifteen)):
        assert checkpoints.resolve(words).path == fifteen, words
    with pytest.raises(CheckpointError, match="is not a folder"):
        checkpoints.resolve(str(tmp_path / "nowhere"))
    moved = checkpoints.set_aside(after=5)
    assert [p.name.startswith("abandoned-step-000000") for p in moved] == [True, True]
    resume = checkpoints.resolve("auto")
    assert resume.path is not None and resume.path.name == "step-00000005" and not resume.skipped


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_the_storage_classes_serve_dcp_itself(tmp_path: Path) -> None:
    folder = tmp_path / "plain-dcp"
    dcp.save(state(4), storage_writer=SafetensorsWriter(folder), planner=flat())
    target = zeros()
    dcp.load(target, storage_reader=SafetensorsReader(folder))
    assert same(target, state(4))


def flat() -> dcp.DefaultSavePlanner:
    return dcp.DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
