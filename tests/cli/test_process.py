"""Process settings: what is set before torch loads, and what is left to the user."""

import re
import subprocess
import sys

import pytest

from llmtrain import machine
from llmtrain.cli import process
from llmtrain.errors import EnvironmentFault


def test_the_users_own_settings_win() -> None:
    new = process.wanted_environment({"OMP_WAIT_POLICY": "active", "OMP_NUM_THREADS": "3"})
    assert "OMP_WAIT_POLICY" not in new
    assert "OMP_NUM_THREADS" not in new
    assert new["MALLOC_MMAP_MAX_"] == "0"


def test_threads_are_shared_between_the_processes_of_a_node(monkeypatch) -> None:
    monkeypatch.setattr(process, "usable_cores", lambda: 16)
    launcher = {"TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "4", "OMP_NUM_THREADS": "1"}
    assert process.wanted_environment(launcher)["OMP_NUM_THREADS"] == "4"
    assert process.wanted_environment({})["OMP_NUM_THREADS"] == "16"
    forced = process.wanted_environment({**launcher, "LLMTRAIN_THREADS": "2"})
    assert forced["OMP_NUM_THREADS"] == "2"


def test_cores_respect_the_affinity_mask_and_the_quota(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    (tmp_path / "cpu.max").write_text("250000 100000\n")
    real = machine._cgroup_cores
    monkeypatch.setattr(machine, "_cgroup_cores", lambda: real(str(tmp_path)))
    assert machine.usable_cores() == 2
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    assert machine.usable_cores() == 1
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert machine.usable_cores() == 8


@pytest.mark.parametrize(
    ("found", "says"),
    [("2.10.1+cu128", "torch 2.10.1+cu128 is too old"), (None, "torch is not installed")],
)
def test_another_torch_is_told_before_it_is_imported(found, says, monkeypatch) -> None:
    def version(name: str) -> str:
        if found is None:
            raise process.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(process.metadata, "version", version)
    with pytest.raises(EnvironmentFault, match=rf"{re.escape(says)}.*pip install 'torch>=2.11'"):
        process.prepare_process()
    for good in ("2.11.0", "2.13.0+cpu", "3.0.0a0+git1234", "unknown"):
        monkeypatch.setattr(process.metadata, "version", lambda name, good=good: good)
        process.check_torch()


def test_a_library_user_is_never_replaced() -> None:
    code = (
        "import os; from llmtrain.cli.process import prepare_process; before = os.getpid();"
        "prepare_process();"
        "print('same', before == os.getpid(), 'LLMTRAIN_PROCESS_READY' in os.environ)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["same", "True", "False"]


def test_the_command_executes_itself_once_with_the_settings() -> None:
    code = (
        "import os, sys; from llmtrain.cli import process; process.this_is_the_command();"
        "process.prepare_process(); print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["passive", "False"]
