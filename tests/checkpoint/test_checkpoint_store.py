"""Pruning and cleaning: what stays, what goes, and what killed runs leave behind."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llmtrain.checkpoint import Checkpointer, Store, latest, scan, store, verify
from llmtrain.config.upkeep import CheckpointConfig
from llmtrain.errors import CheckpointError


def fill(root: Path, steps: dict[int, bool], keep: int = 99) -> None:
    checkpoints = Checkpointer(root, CheckpointConfig(asynchronous=False, keep=keep))
    for step, permanent in steps.items():
        checkpoints.save(step, {"model.w": torch.full((9,), float(step))}, permanent=permanent)
    checkpoints.close()


def steps(root: Path) -> list[int]:
    return [c.step for c in scan(root)]


def damage(root: Path, step: int) -> None:
    path = root / f"step-{step:08d}" / "model-00000-of-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("keep", "permanent", "left"),
    [
        (1, set(), [6]),
        (2, set(), [5, 6]),
        (2, {1, 3}, [1, 3, 5, 6]),
        (2, {6}, [4, 5, 6]),
        (1, {1, 2, 3, 4, 5, 6}, [1, 2, 3, 4, 5, 6]),
        (9, set(), [1, 2, 3, 4, 5, 6]),
    ],
)
def test_saving_keeps_the_newest_and_the_permanent(
    tmp_path: Path, keep: int, permanent: set[int], left: list[int]
) -> None:
    fill(tmp_path, {step: step in permanent for step in range(1, 7)}, keep)
    assert steps(tmp_path) == left


def test_pruning_spares_the_only_good_one(tmp_path: Path) -> None:
    fill(tmp_path, dict.fromkeys(range(1, 6), False))
    for step in (4, 5):
        damage(tmp_path, step)
    store = Store(tmp_path)
    assert [c.step for c in store.superfluous(keep=1)] == [1, 2, 4]
    assert [c.step for c in store.prune(keep=2)] == [1, 2]
    assert steps(tmp_path) == [3, 4, 5]
    assert store.prune(keep=2) == []


def test_pruning_takes_the_damaged_too_when_a_good_one_stays(tmp_path: Path) -> None:
    fill(tmp_path, {1: True, 2: False, 3: False, 4: False})
    for step in (2, 4):
        damage(tmp_path, step)
    assert [c.step for c in Store(tmp_path).prune(keep=1)] == [2, 3]
    assert steps(tmp_path) == [1, 4]


def test_starting_over_puts_the_other_course_away(tmp_path: Path) -> None:
    """A run begun again in its folder: its saves count as newest, and nothing is deleted."""
    fill(tmp_path, {100: False, 200: True})
    checkpoints = Checkpointer(tmp_path, CheckpointConfig(asynchronous=False, keep=1))
    assert checkpoints.resolve("never").path is None
    checkpoints.save(10, {"model.w": torch.zeros(9)})
    saved = checkpoints.wait()
    assert saved is not None and saved.note is not None and "another course" in saved.note
    assert checkpoints.latest() == tmp_path / "step-00000010"
    assert [c.step for c in Store(tmp_path).abandoned()] == [100, 200]
    assert all(verify(c.path) == [] for c in Store(tmp_path).abandoned())


def test_a_failure_to_prune_does_not_fail_the_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpointer(tmp_path, CheckpointConfig(asynchronous=False, keep=1))
    checkpoints.save(1, {"model.w": torch.zeros(9)})

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("shutil.rmtree", refuse)
    checkpoints.save(2, {"model.w": torch.zeros(9)})
    saved = checkpoints.wait()
    assert saved is not None and saved.note is not None and "cannot be deleted" in saved.note
    assert steps(tmp_path) == [2]


def test_the_next_run_clears_what_a_kill_left(tmp_path: Path) -> None:
    fill(tmp_path, {1: False, 2: False})
    one = tmp_path / "step-00000001"
    shutil.copytree(one, tmp_path / ".tmp-step-00000003-aaaa")
    shutil.copytree(one, tmp_path / ".del-step-00000001-bbbb")
    shutil.copytree(one, tmp_path / ".old-step-00000002-cccc")
    one.rename(tmp_path / ".old-step-00000001-dddd")
    (tmp_path / "notes").mkdir()
    store = Store(tmp_path)
    store.open()
    # Killed between the two renames of replacing step 1: the old one is put back.
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        ".lock", "notes", "step-00000001", "step-00000002",
    ]  # fmt: skip
    assert verify(one) == []
    store.close()


def test_unpublished_and_foreign_names_are_not_checkpoints(tmp_path: Path) -> None:
    fill(tmp_path, {1: False})
    for name in (
        "step-2",
        "step-00000003.bak",
        ".tmp-step-00000004-x",
        "abandoned-step-00000005-x",
    ):
        shutil.copytree(tmp_path / "step-00000001", tmp_path / name)
    (tmp_path / "step-00000006").write_text("a file")
    (tmp_path / "step-00000007").mkdir()
    assert steps(tmp_path) == [1, 7]
    assert latest(tmp_path) == tmp_path / "step-00000001"


def test_locks_are_told_apart_from_missing_lock_support(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file system without locks is used without clearing: a sibling may be alive."""
    fill(tmp_path, {1: False})
    (tmp_path / ".tmp-step-00000002-aaaa").mkdir()

    def unsupported(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.lockf", unsupported)
    store = Store(tmp_path)
    store.open()
    assert (tmp_path / ".tmp-step-00000002-aaaa").exists()
    store.close()


def test_a_folder_held_by_another_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, {1: False})
    (tmp_path / ".lock").write_text('{"host": "elsewhere", "pid": 7}')

    def held(*_: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr("fcntl.lockf", held)
    with pytest.raises(CheckpointError, match=r"another run is writing .*elsewhere.*another name"):
        Store(tmp_path).open(patience=0.0)


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut between the two would leave a name with nothing behind it."""
    synced: list[tuple[str, bool]] = []
    named = tmp_path / "step-00000001"
    monkeypatch.setattr(store, "sync", lambda p: synced.append((p.name, named.exists())))
    own = store.Store(tmp_path)
    own.publish(own.begin(1), 1)
    assert [exists for _, exists in synced] == [False, True]
    assert synced[0][0].startswith(".tmp-") and synced[1][0] == tmp_path.name


def test_room_is_made_where_another_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = store.Store(tmp_path)
    there = [SimpleNamespace(bytes=n, path=tmp_path / str(n)) for n in (90, 100)]
    pruned: list[int] = []
    monkeypatch.setattr(store, "scan", lambda root: there)
    monkeypatch.setattr(own, "prune", lambda keep: pruned.append(keep) or there[:1])
    for free in (106, 104):
        usage = SimpleNamespace(free=free)
        monkeypatch.setattr(store.shutil, "disk_usage", lambda path, usage=usage: usage)
        assert own.make_room() == ([] if free > 105 else there[:1])
    assert pruned == [1]
