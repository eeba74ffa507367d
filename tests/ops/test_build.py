"""Where kernels are compiled: what broken builds leave there goes, what others work in stays."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from llmtrain.ops import build

ROOT = Path(__file__).resolve().parents[2]


def test_a_build_removes_what_a_killed_one_left_and_nothing_of_one_that_works(
    tmp_path: Path,
) -> None:
    """The killed one: a child that ends without any clean-up, as at a SIGKILL."""
    ready, done = os.pipe(), os.pipe()
    children = []
    for killed in (True, False):
        child = os.fork()
        if child == 0:
            with build.workplace(tmp_path) as folder:
                (Path(folder) / f"{'dead' if killed else 'alive'}.o").touch()
                os.write(ready[1], b"x")
                os.close(done[1])
                if not killed:
                    os.read(done[0], 1)  # until the parent closes it
                os._exit(0)
        children.append(child)
        assert os.read(ready[0], 1) == b"x"
        if killed:
            os.waitpid(child, 0)
            assert len(list(tmp_path.glob(".build-*/dead.o"))) == 1
    with build.workplace(tmp_path) as own:
        left = sorted(file.name for file in tmp_path.glob(".build-*/*"))
        assert left == ["alive.o"] and len(list(tmp_path.iterdir())) == 2
    assert not Path(own).exists()
    os.close(done[1])
    os.waitpid(children[1], 0)
    with pytest.raises(ZeroDivisionError), build.workplace(tmp_path) as own:
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_git_does_not_see_it() -> None:
    assert ".build-*/" in (ROOT / ".gitignore").read_text("utf-8").splitlines()
