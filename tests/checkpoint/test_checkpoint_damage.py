"""Damaged checkpoints and failing disks: each a clear sentence, and the last good one resumes."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from llmtrain.checkpoint import Checkpointer, latest, read_files, safefile, scan, verify
from llmtrain.config.upkeep import CheckpointConfig
from llmtrain.errors import CheckpointError

SYNC = CheckpointConfig(asynchronous=False, keep=5)
ASYNC = CheckpointConfig(asynchronous=True, keep=5)
FILES = {"config.yaml": "seed: 1", "tokenizer.json": "{}", "data.json": "{}", "extra.json": "{}"}


def state(value: float) -> dict[str, torch.Tensor]:
    return {"model.w": torch.full((60, 50), value), "optim.w": torch.full((60, 50), -value)}


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("template") / "checkpoints"
    checkpoints = Checkpointer(root, SYNC)
    for step in (10, 20):
        checkpoints.save(step, state(step), FILES, meta={"tokens": step})
    checkpoints.close()
    return root


@pytest.fixture
def root(template: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(template, tmp_path / "checkpoints"))


def flip(position: float) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[int(position * (len(data) - 1))] ^= 4
        path.write_bytes(data)

    return damage


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def remove(path: Path) -> None:
    path.unlink()


def empty(path: Path) -> None:
    os.truncate(path, 0)


DAMAGES = {
    "first byte": flip(0), "a byte in the middle": flip(0.5), "last byte": flip(1),
    "truncated": truncate, "grown": grow, "missing": remove, "empty": empty,
}  # fmt: skip
NAMES = [
    "model-00000-of-00001.safetensors", "optim-00000-of-00001.safetensors",
    "tensors.json", "meta.json", "checksums.json", "tokenizer.json", "config.yaml",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_any_damage_is_found_named_and_survived(root: Path, name: str, damage: str) -> None:
    newest = root / "step-00000020"
    DAMAGES[damage](newest / name)
    problems = verify(newest)
    assert problems and name in problems[0]
    with pytest.raises(CheckpointError) as caught:
        Checkpointer(root, SYNC).load(newest, state(0))
    message = str(caught.value)
    assert name in message and "\n" not in message
    assert f"checkpoint.resume={root}/step-00000010" in message
    checkpoints = Checkpointer(root, SYNC)
    resume = checkpoints.resolve("auto")
    assert resume.path == root / "step-00000010"
    assert len(resume.skipped) == 1 and name in resume.skipped[0]
    target = state(0)
    checkpoints.load(resume.path, target, verify=False)
    assert torch.equal(target["model.w"], state(10)["model.w"])


@pytest.mark.parametrize("name", ["tokenizer.json", "config.yaml"])
def test_small_files_are_checked_when_read(root: Path, name: str) -> None:
    flip(0.5)(root / "step-00000010" / name)
    with pytest.raises(CheckpointError, match=rf"{name} is damaged"):
        read_files(root / "step-00000010")
    remove(root / "step-00000020" / name)
    with pytest.raises(CheckpointError, match=rf"{name} is missing"):
        read_files(root / "step-00000020")


def test_nothing_good_left(root: Path) -> None:
    for step in (10, 20):
        flip(0.5)(root / f"step-{step:08d}" / NAMES[0])
    checkpoints = Checkpointer(root, SYNC)
    resume = checkpoints.resolve("auto")
    assert resume.path is None and len(resume.skipped) == 2
    with pytest.raises(CheckpointError, match="no earlier checkpoint"):
        checkpoints.load(root / "step-00000010", state(0))


def test_metadata_that_contradicts_the_files(root: Path) -> None:
    """With fitting checksums: a wrong tensors.json is found by headers and cover."""
    folder = root / "step-00000020"
    original = json.loads((folder / "tensors.json").read_text())

    def problems_with(**change: object) -> str:
        body = json.loads(json.dumps(original))
        body["tensors"]["model.w"].update(change)
        (folder / "tensors.json").write_text(json.dumps(body))
        resign(folder, "tensors.json")
        return verify(folder)[0]

    whole = {"file": 0, "offset": [0, 0], "shape": [60, 50]}
    assert verify(folder) == []
    assert "does not hold model.w" in problems_with(dtype="BF16")
    assert "3000 stored elements instead of 3050" in problems_with(shape=[61, 50])
    assert "6000 stored elements instead of 3000" in problems_with(chunks=[whole, whole])
    half = {"file": 0, "offset": [30, 0], "shape": [30, 50]}
    assert "overlapping chunks at [30, 0]" in problems_with(chunks=[half, half])
    assert "outside of it" in problems_with(chunks=[{**whole, "offset": [1, 0]}])
    body = {**original, "version": 99}
    (folder / "tensors.json").write_text(json.dumps(body))
    resign(folder, "tensors.json")
    assert "has version 99; this llmtrain reads 1" in verify(folder)[0]


@pytest.mark.parametrize("way", ["/etc/passwd", "../step-00000010/{}", ".."])
def test_file_names_cannot_leave_the_folder(root: Path, way: str) -> None:
    """With fitting checksums, and a file that exists where the name leads."""
    folder = root / "step-00000020"
    body = json.loads((folder / "tensors.json").read_text())
    body["files"][0] = way.format(body["files"][0])
    (folder / "tensors.json").write_text(json.dumps(body))
    resign(folder, "tensors.json")
    with pytest.raises(CheckpointError, match=r"tensors\.json is damaged"):
        Checkpointer(root, SYNC).load(folder, state(0), verify=False)


@pytest.mark.parametrize("name", ["meta.json", "tensors.json", "checksums.json"])
def test_json_that_is_nested_without_end_is_damage(root: Path, name: str) -> None:
    """Python's reader gives up on it with an error of its own kind."""
    folder = root / "step-00000020"
    (folder / name).write_text("[" * 100_000)
    if name != "checksums.json":
        resign(folder, name)
    found = scan(root)
    assert f"{name} is damaged" in " ".join([*verify(folder), str(found[-1].problem)])
    assert found[0].problem is None


@pytest.mark.parametrize("odd", [[[], 50], [1e999, 50], [True, 50], None, "60"])
def test_shapes_that_are_no_numbers_are_damage(root: Path, odd: object) -> None:
    folder = root / "step-00000020"
    body = json.loads((folder / "tensors.json").read_text())
    body["tensors"]["model.w"]["chunks"][0]["offset"] = odd
    (folder / "tensors.json").write_text(json.dumps(body))
    resign(folder, "tensors.json")
    assert verify(folder) == [f"{folder / 'tensors.json'} is damaged"]


@pytest.mark.parametrize(("name", "size"), [("a\0b", 1), ("meta.json", 1e999)])
def test_checksums_of_no_file_are_damage(root: Path, name: str, size: float) -> None:
    from llmtrain.checkpoint import layout

    folder = root / "step-00000020"
    body = json.loads((folder / "checksums.json").read_text())
    body["files"][name] = {**body["files"]["meta.json"], "bytes": size}
    body["digest"] = layout._digest(body["files"])
    (folder / "checksums.json").write_text(json.dumps(body))
    assert "checksums.json is damaged" in verify(folder)[0]
    assert scan(root)[-1].problem is not None


def resign(folder: Path, name: str) -> None:
    from llmtrain.checkpoint.layout import checksums_text, read_checksums
    from llmtrain.checkpoint.safefile import FileSum, hash_file

    sums = read_checksums(folder)
    sums[name] = FileSum(name, (folder / name).stat().st_size, hash_file(folder / name))
    (folder / "checksums.json").write_bytes(checksums_text(sums.values()))


@pytest.fixture
def small_files_only() -> Iterator[None]:
    """The kernel itself refuses to let a file grow beyond 8 kB, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("cfg", [SYNC, ASYNC])
def test_a_write_the_kernel_refuses(
    root: Path, cfg: CheckpointConfig, small_files_only: None
) -> None:
    checkpoints = Checkpointer(root, cfg)
    with pytest.raises(CheckpointError) as caught:
        checkpoints.save(30, state(30), FILES)
        checkpoints.wait()
    expect_untouched(root, checkpoints, str(caught.value), "larger than this process may write")


FAULTS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "quota",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission denied",
    errno.EIO: "healthy disk",
}
CALLS = ["write", "fsync", "open", "mkdir", "rename"]


@pytest.mark.parametrize("cfg", [SYNC, ASYNC], ids=["sync", "async"])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("number", FAULTS, ids=errno.errorcode.get)
def test_a_failing_disk(
    root: Path, monkeypatch: pytest.MonkeyPatch, number: int, call: str, cfg: CheckpointConfig
) -> None:
    """Each system call of a save fails as on a full or read-only disk."""
    checkpoints = Checkpointer(root, cfg)
    monkeypatch.setattr(os, call, failing(getattr(os, call), root, number))
    with pytest.raises(CheckpointError) as caught:
        checkpoints.save(30, state(30), FILES)
        while checkpoints.busy:
            checkpoints.poll()
    monkeypatch.undo()
    expect_untouched(root, checkpoints, str(caught.value), FAULTS[number])


def failing(real: Callable[..., object], root: Path, number: int) -> Callable[..., object]:
    def call(first: object, *args: object, **kwargs: object) -> object:
        path = os.readlink(f"/proc/self/fd/{first}") if isinstance(first, int) else str(first)
        writes = not args or args[0] != os.O_RDONLY
        if path.startswith(str(root)) and writes:
            raise OSError(number, os.strerror(number), path)
        return real(first, *args, **kwargs)

    return call


def expect_untouched(root: Path, checkpoints: Checkpointer, message: str, words: str) -> None:
    assert words in message and "step 30" in message and "\n" not in message
    assert not checkpoints.busy
    assert [c.step for c in scan(root)] == [10, 20]
    assert not list(root.glob(".tmp-*")), "what was half written is gone"
    assert latest(root) == root / "step-00000020" and verify(root / "step-00000020") == []
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    checkpoints.save(30, state(30), FILES)
    checkpoints.wait()
    assert [c.step for c in scan(root)] == [10, 20, 30], "and saving works again with room"
    checkpoints.close()


def test_a_place_where_no_folder_can_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for place in (tmp_path / "file" / "checkpoints", Path("/proc/llmtrain/checkpoints")):
        with pytest.raises(CheckpointError, match=r"cannot be used for checkpoints: .*set `out`"):
            Checkpointer(place, SYNC)


def test_a_mistake_of_ours_is_not_dressed_up(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: object, data: object) -> None:
        raise ZeroDivisionError("ours")

    checkpoints = Checkpointer(root, ASYNC)
    monkeypatch.setattr(safefile.HashingFile, "write", broken)
    checkpoints.save(30, state(30))
    with pytest.raises(ZeroDivisionError, match="ours"):
        checkpoints.close()
    assert [c.step for c in scan(root)] == [10, 20] and not list(root.glob(".tmp-*"))


def test_a_failing_save_does_not_hide_another_error(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: object, data: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(safefile.HashingFile, "write", full)
    with pytest.raises(KeyError, match="first"), Checkpointer(root, ASYNC) as checkpoints:
        checkpoints.save(30, state(30))
        raise KeyError("first")
    with pytest.raises(CheckpointError, match="disk is full"), Checkpointer(root, ASYNC) as again:
        again.save(30, state(30))
