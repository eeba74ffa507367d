"""Copies of checkpoints in an object store that fails, and runs that come back from them."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import fsspec
import pytest
import torch
import torch.distributed as dist
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from helpers.ranks import run_ranks
from helpers.stored import bits
from helpers.tiny import make_corpus, records, tiny_config
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from llmtrain.checkpoint import Checkpointer, Store, objects, verify
from llmtrain.checkpoint.coordination import Ranks
from llmtrain.checkpoint.objects import COMPLETE, Objects
from llmtrain.checkpoint.remote import Mirror
from llmtrain.cli.main import main
from llmtrain.config.upkeep import CheckpointConfig
from llmtrain.errors import CheckpointError, EnvironmentFault

SAVING = CheckpointConfig(asynchronous=False, keep=5)


class Flaky(MemoryFileSystem):
    """A store in memory whose calls fail when ``fails`` says so."""

    protocol = "flaky"
    cachable = False
    fails: Iterator[bool] = itertools.repeat(False)
    files: ClassVar[list[str]] = []
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]

    def _maybe(self, what: str) -> None:
        if next(Flaky.fails):
            raise ConnectionResetError("the wire is cut")
        Flaky.files.append(what.rpartition("/")[2])

    def put_file(self, lpath: str, rpath: str, *args: Any, **kwargs: Any) -> None:
        self._maybe(rpath)
        super().put_file(lpath, rpath, *args, **kwargs)

    def get_file(self, rpath: str, lpath: str, *args: Any, **kwargs: Any) -> None:
        self._maybe(rpath)
        super().get_file(rpath, lpath, *args, **kwargs)

    def pipe_file(self, path: str, value: bytes, *args: Any, **kwargs: Any) -> None:
        self._maybe(path)
        super().pipe_file(path, value, *args, **kwargs)

    def ls(self, path: str, *args: Any, **kwargs: Any) -> Any:
        self._maybe("ls")
        return super().ls(path, *args, **kwargs)


fsspec.register_implementation("flaky", Flaky, clobber=True)


@pytest.fixture(autouse=True)
def empty() -> None:
    Flaky.store.clear()
    Flaky.files.clear()
    Flaky.fails = itertools.repeat(False)


def mirror(waits: list[float], keep: int = 2) -> Mirror:
    return Mirror("flaky://bucket/runs", "tiny", keep, wait=waits.append)


def state(value: float) -> dict[str, torch.Tensor]:
    return {"model.w": torch.full((5, 3), value), "optim.w": torch.full((5, 3), -value)}


def saved(root: Path, steps: range, permanent: tuple[int, ...] = ()) -> list[Path]:
    with Checkpointer(root, SAVING) as checkpoints:
        for step in steps:
            checkpoints.save(step, state(step), permanent=step in permanent)
    return [root / f"step-{step:08d}" for step in steps]


def test_a_store_that_fails_now_and_then_gets_every_copy(tmp_path: Path) -> None:
    waits: list[float] = []
    copies = mirror(waits)
    Flaky.fails = itertools.cycle([False, True, False, True, True])
    for step, path in enumerate(saved(tmp_path / "a", range(1, 5), permanent=(1,)), 1):
        copies.push(path, step)
    assert [copy.problem for copy in copies.finish()] == [None] * 4
    assert len(waits) > 10 and max(waits) <= 8
    Flaky.fails = itertools.repeat(False)
    assert copies.objects.steps() == [1, 3, 4]
    assert not list((tmp_path / "a").glob(".up-*"))
    store = Store(tmp_path / "b")
    store.open()
    assert copies.bring_home(store) == 4
    assert verify(tmp_path / "b" / "step-00000004") == []
    assert bits(tmp_path / "b" / "step-00000004") == bits(tmp_path / "a" / "step-00000004")
    assert copies.bring_home(store) is None
    store.close()


def test_the_marker_comes_last_and_without_it_nothing_counts(tmp_path: Path) -> None:
    first, second, third = saved(tmp_path / "a", range(1, 4))
    copies = mirror([])
    copies.push(first, 1)
    assert copies.finish()[0].problem is None
    assert Flaky.files.index(COMPLETE) > Flaky.files.index("checksums.json")
    # The wire is cut for good after three files of the second.
    Flaky.fails = itertools.chain([False] * 4, itertools.repeat(True))
    copies.push(second, 2)
    problem = copies.finish()[0].problem
    assert problem is not None and "step 2 was not copied: flaky://bucket/runs failed 5" in problem
    Flaky.fails = itertools.repeat(False)
    assert copies.objects.steps() == [1]
    assert any("step-00000002" in name for name in Flaky.store)
    copies.push(third, 3)
    copies.finish()
    assert copies.objects.steps() == [1, 3]
    assert not any("step-00000002" in name for name in Flaky.store)


@pytest.mark.parametrize("name", ["../../evil", "/evil", "a\0b"])
def test_a_copy_cannot_write_outside_of_its_folder(tmp_path: Path, name: str) -> None:
    """Whoever can write to the store is not thereby allowed to write to this machine."""
    copies = mirror([])
    copies.push(saved(tmp_path / "a", range(1, 2))[0], 1)
    copies.finish()
    marker = copies.objects.marker("step-00000001")
    assert marker is not None
    marker["files"].insert(0, name)
    copies.objects.complete("step-00000001", marker, "test")
    store = Store(tmp_path / "b" / "c")
    store.open()
    with pytest.raises(CheckpointError, match="not a file"):
        copies.bring_home(store)
    store.close()
    assert not list(tmp_path.rglob("evil")) and not Path("/evil").exists()


def test_a_damaged_copy_is_passed_over(tmp_path: Path) -> None:
    copies = mirror([])
    for step, path in enumerate(saved(tmp_path / "a", range(1, 3)), 1):
        copies.push(path, step)
    copies.finish()
    name = next(n for n in Flaky.store if "step-00000002/model" in n)
    data = bytearray(Flaky.store[name].getvalue())
    data[-3] ^= 1
    copies.objects.fs.pipe_file(name, bytes(data))
    store = Store(tmp_path / "b")
    store.open()
    assert copies.bring_home(store) == 1
    assert [p.name for p in sorted((tmp_path / "b").glob("*step*"))] == ["step-00000001"]
    Flaky.fails = itertools.repeat(True)
    with pytest.raises(CheckpointError, match="cannot be listed"):
        copies.bring_home(store)
    store.close()


def test_an_address_nobody_knows() -> None:
    with pytest.raises(EnvironmentFault, match=r"checkpoint\.remote: nowhere addresses"):
        Mirror("nowhere://bucket", "tiny", 2)
    for address in (
        "sftp://me:secret@host/runs", "abfs://a:secret@b.host/runs", "s3://bucket/runs?sig=secret"
    ):  # fmt: skip
        with pytest.raises(EnvironmentFault, match="credentials by the env") as refused:
            Mirror(address, "tiny", 2)
        assert "secret" not in str(refused.value)
    assert Objects("flaky://bucket/me@home", "tiny").steps() == []
    with pytest.raises(EnvironmentFault, match="abfs addresses cannot be used"):
        Mirror("abfs://container@account.host/runs", "tiny", 2)  # no secret; adlfs is not there


def test_a_run_whose_folder_is_lost_comes_back_from_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects, "FIRST_WAIT", 0.001)
    changes: dict[str, Any] = {
        "train__duration": "6step",
        "eval__every": None,
        "eval__samples": 2,
        "checkpoint__every": "2step",
        "checkpoint__remote": "flaky://bucket/runs",
    }
    config = tiny_config(tmp_path, make_corpus(tmp_path, documents=40), **changes)
    assert main(["train", str(config), "name=straight", "checkpoint.remote=null"]) == 0
    Flaky.fails = itertools.cycle([False, False, True])
    assert main(["train", str(config), "train.stop_after=4step"]) == 0
    run = tmp_path / "runs" / "tiny"
    assert any("step 4 copied" in event["text"] for event in records(run, "event"))
    shutil.rmtree(run)
    assert main(["train", str(config)]) == 0
    assert [record["step"] for record in records(run)] == [5, 6]
    last = "checkpoints/step-00000006"
    assert bits(run / last) == bits(tmp_path / "runs" / "straight" / last)
    assert any("step-00000006/COMPLETE" in name for name in Flaky.store)


def test_a_disk_that_fills_up_keeps_the_newest_good_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "a"
    saved(root, range(1, 5), permanent=(1,))
    newest = root / "step-00000004" / "meta.json"
    newest.write_bytes(newest.read_bytes().replace(b"4", b"9", 1))
    with Checkpointer(root, SAVING) as checkpoints:
        checkpoints.save(5, state(5))
        assert len(list(root.glob("step-*"))) == 5
        nothing = SimpleNamespace(total=10, used=9, free=1)
        monkeypatch.setattr("llmtrain.checkpoint.store.shutil.disk_usage", lambda _: nothing)
        checkpoints.save(6, state(6))
    left = sorted(int(path.name[5:]) for path in root.glob("step-*"))
    assert left == [1, 5, 6]


def test_a_folder_takes_copies_and_a_marker_that_is_not_ours_counts_for_nothing(
    tmp_path: Path,
) -> None:
    copies = Mirror(f"{tmp_path}/remote", "tiny", 5, wait=lambda seconds: None)
    for step, path in enumerate(saved(tmp_path / "a", range(1, 4)), 1):
        copies.push(path, step)
    assert [one.problem for one in copies.finish()] == [None] * 3
    last = tmp_path / "remote" / "tiny" / "step-00000003"
    for text in ("", "{", "[]", "{}", '{"files": 3, "permanent": true}'):
        (last / COMPLETE).write_text(text)
        assert copies.objects.steps() == [1, 2]
    (last / COMPLETE).write_text('{"files": ["gone"], "permanent": true}')
    store = Store(tmp_path / "b")
    store.open()
    assert copies.bring_home(store) == 2
    store.close()
    with pytest.raises(EnvironmentFault, match="is empty"):
        Mirror(" ", "tiny", 5)


def test_copies_of_a_beginning_that_was_given_up_do_not_come_home(
    tmp_path: Path, corpus: Path
) -> None:
    changes = {"eval__every": None, "eval__samples": 2, "checkpoint__every": "1step"}
    config = tiny_config(tmp_path, corpus, **changes, checkpoint__remote=f"{tmp_path}/remote")
    assert main(["train", str(config), "train.duration=3step"]) == 0
    again = ["train", str(config), "train.duration=3step", "optim.lr=1e-3"]
    stop = "hooks=[{use: 'helpers.hooks:Stop', args: {at: 3}}]"
    assert main([*again, "checkpoint.resume=never", "checkpoint.asynchronous=false", stop]) == 130
    assert main(again) == 0
    run = tmp_path / "runs" / "tiny"
    (event,) = [e for e in records(run, "event") if "resumed" in e["text"]]
    assert event["text"] != "resumed from step-00000003"


def halves(rank: int, step: int) -> dict[str, torch.Tensor]:
    """A tensor of which each of two ranks holds, and so writes, the half."""
    mesh = init_device_mesh("cpu", (2,))
    whole = torch.arange(30.0).reshape(10, 3) * step
    return {"model.w": distribute_tensor(whole, mesh, [Shard(0)])}


def copying(rank: int, folder: Path) -> dict[str, Any]:
    """Two ranks save and copy; at step 2 the store fails for the second one."""
    put: list[str] = []
    broken = [False]
    real = LocalFileSystem.put_file

    def put_file(self: Any, lpath: str, rpath: str, *args: Any, **kwargs: Any) -> None:
        if broken[0] and rank == 1:
            raise ConnectionResetError("the wire is cut")
        put.append(rpath.rpartition("/")[2])
        real(self, lpath, rpath, *args, **kwargs)

    LocalFileSystem.put_file = put_file
    ranks = Ranks(dist.new_group(backend="gloo"))
    copies = Mirror(str(folder / "remote"), "tiny", 2, ranks, wait=lambda seconds: None)
    ended = []
    with Checkpointer(folder / "a", SAVING, ranks.group) as checkpoints:
        for step in (1, 2, 3):
            broken[0] = step == 2
            checkpoints.save(step, halves(rank, step))
            copies.push(folder / "a" / f"step-{step:08d}", step)
            ended += copies.finish()
            if step == 2:
                assert copies.objects.steps() == [1]
    with Checkpointer(folder / "b", SAVING, ranks.group) as checkpoints:
        brought = checkpoints.with_store(copies.bring_home)
        again = checkpoints.with_store(copies.bring_home)
        loaded = halves(rank, 0)
        checkpoints.load(folder / "b" / "step-00000003", loaded)
        same = torch.equal(
            loaded["model.w"].full_tensor(), halves(rank, 3)["model.w"].full_tensor()
        )
    return {"put": put, "problems": [one.problem for one in ended], "home": [brought, again, same]}


@pytest.mark.dist
def test_every_rank_copies_its_own_files_and_one_that_fails_leaves_no_marker(
    tmp_path: Path,
) -> None:
    first, second = run_ranks(2, copying, tmp_path)
    for rank, found in enumerate((first, second)):
        own = [name for name in found["put"] if name.startswith("model-")]
        assert own == [f"model-0000{rank}-of-00002.safetensors"] * (3 - rank)
        assert [problem is None for problem in found["problems"]] == [True, False, True]
        assert "failed 5 times" in found["problems"][1] and "(rank 1 of 2)" in found["problems"][1]
        assert found["home"] == [3, None, True]
    assert "checksums.json" in first["put"] and "checksums.json" not in second["put"]
    # The next copy clears away what the failed one left.
    assert {path.name for path in (tmp_path / "remote/tiny").iterdir()} == {
        "step-00000001", "step-00000003"
    }  # fmt: skip
    assert not list((tmp_path / "a").glob(".up-*"))
