"""A run killed at any system call of a save leaves a checkpoint that resumes."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.ranks import RankError, run_ranks

from llmtrain.checkpoint import Checkpointer, verify
from llmtrain.config.upkeep import CheckpointConfig
from llmtrain.errors import CheckpointError

pytestmark = pytest.mark.dist
CONFIG = CheckpointConfig(asynchronous=False, keep=2)
# What changes a folder, by name in `os`; shutil and pathlib go through these.
CALLS = ("write", "fsync", "mkdir", "rename", "unlink", "rmdir", "ftruncate", "pwrite")


def state(value: float) -> dict[str, torch.Tensor]:
    return {"model.w": torch.full((5, 3), value), "optim.w": torch.full((5, 3), -value)}


def kill_at(number: int) -> None:
    """Die by SIGKILL right before the n-th changing system call from here on."""
    left = [number]

    def counted(real: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return call

    for name in CALLS:
        setattr(os, name, counted(getattr(os, name)))


def save_and_die(rank: int, root: Path, step: int, number: int) -> None:
    checkpoints = Checkpointer(root, CONFIG)
    kill_at(number)
    checkpoints.save(step, state(step))


def open_and_die(rank: int, root: Path, number: int) -> None:
    kill_at(number)
    Checkpointer(root, CONFIG)


def killed(body: Callable[..., None], *args: object) -> bool:
    """True when the process died, False when it came to its end."""
    try:
        run_ranks(1, body, *args, init=False)
    except RankError as error:
        assert "died without a word" in str(error)
        return True
    return False


@pytest.mark.parametrize("step", [3, 2], ids=["new step", "same step again"])
def test_killed_before_every_system_call_of_a_save(tmp_path: Path, step: int) -> None:
    template = tmp_path / "template"
    checkpoints = Checkpointer(template, CONFIG)
    for first in (1, 2):
        checkpoints.save(first, state(first))
    checkpoints.close()
    outcomes = []
    number = 1
    while True:
        root = tmp_path / f"run-{number}"
        shutil.copytree(template, root)
        died = killed(save_and_die, root, step, number)
        # The successor is killed as well, somewhere in its clearing up.
        killed(open_and_die, root, 1 + number % 5)
        checkpoints = Checkpointer(root, CONFIG)
        resume = checkpoints.resolve("auto")
        assert resume.path is not None and not resume.skipped, number
        newest = int(resume.path.name.removeprefix("step-"))
        target = state(0)
        checkpoints.load(resume.path, target, verify=False)
        assert torch.equal(target["model.w"], state(newest)["model.w"])
        assert not [p for p in root.iterdir() if p.name.startswith((".tmp", ".del", ".old"))]
        for path in root.glob("step-*"):
            assert verify(path) == []
        outcomes.append(newest)
        checkpoints.close()
        shutil.rmtree(root)
        if not died:
            break
        number += 1
    assert number > 20, "a save makes many calls"
    assert outcomes == sorted(outcomes) and {2, step} == set(outcomes)


def hold(rank: int, root: Path, seconds: float) -> None:
    checkpoints = Checkpointer(root, CONFIG)
    checkpoints.save(1, state(1))
    time.sleep(seconds)
    os.kill(os.getpid(), signal.SIGKILL)


def contend(rank: int, root: Path) -> str:
    if rank == 1:
        hold(rank, root, 1.5)
    while not (root / "step-00000001").exists():
        time.sleep(0.02)
    from llmtrain.checkpoint import Store

    store = Store(root)
    with pytest.raises(CheckpointError, match=r"another run is writing .*pid") as caught:
        store.open(patience=0.2)
    store.open(patience=30.0)  # the other dies by kill -9 meanwhile: the kernel frees the lock
    return str(caught.value)


def test_two_runs_do_not_write_to_one_folder(tmp_path: Path) -> None:
    with pytest.raises(RankError) as caught:
        run_ranks(2, contend, tmp_path, init=False)
    assert "rank 1: died without a word" in str(caught.value)
    assert "rank 0" not in str(caught.value)
