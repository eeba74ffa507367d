"""An error that all processes have is said once, and the launcher ends with its code."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.ranks import run_ranks
from helpers.tiny import environment, make_corpus, tiny_config
from torch.distributed import TCPStore

from llmtrain.cli import chorus
from llmtrain.cli.chorus import said_elsewhere
from llmtrain.machine import tell_launcher

LAUNCHER = Path(__file__).parents[2] / "launch" / "local.sh"


@pytest.fixture
def agent(monkeypatch: pytest.MonkeyPatch) -> TCPStore:
    """The store that torchrun's agent keeps, as its workers are told of it."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    return store


def test_one_of_several_says_it_and_each_its_own(
    agent: TCPStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chorus, "PATIENCE", 20.0)
    both = run_ranks(3, lambda rank: said_elsewhere("the same"), init=False)
    assert both == [False, True, True]  # the first rank, whoever is faster
    monkeypatch.setattr(chorus, "PATIENCE", 0.05)
    own = run_ranks(3, lambda rank: said_elsewhere(f"of {rank}"), init=False)
    assert own == [False, False, False]
    alone = run_ranks(3, lambda rank: rank > 0 and said_elsewhere("not the first's"), init=False)
    assert sorted(alone) == [False, False, True]
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert not said_elsewhere("the same")


def test_without_an_agent_each_speaks_for_itself(
    agent: TCPStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not said_elsewhere("x") and said_elsewhere("x")
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE")
    assert not said_elsewhere("x")


@pytest.mark.parametrize(
    ("codes", "end"),
    [
        ([("0", 2), ("1", 2)], "2"),
        ([("1", 2), ("0", 1)], "2"),  # the first rank only lost the one that failed
        ([("0", 1), ("1", 2)], "2"),
        ([("1", 2), ("0", 75)], "75"),
        ([("0", 0)], "0"),
    ],
)
def test_the_launcher_is_told_the_code_that_says_most(
    codes: list[tuple[str, int]], end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "code").touch()
    monkeypatch.setenv("LLMTRAIN_EXIT_FILE", str(tmp_path / "code"))
    for rank, code in codes:
        monkeypatch.setenv("RANK", rank)
        tell_launcher(code)
    assert (tmp_path / "code").read_text() == end


@pytest.mark.dist
def test_a_data_error_of_all_ranks_is_said_once(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path, documents=40)
    (corpus / "tokenizer.json").unlink()
    done = subprocess.run(
        [str(LAUNCHER), str(tiny_config(tmp_path, corpus))],
        env=environment(NPROC="2", PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}"),
        capture_output=True, text=True, check=False, timeout=200,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("llmtrain: ")]
    assert len(said) == 1 and "tokenizer.json" in said[0], done.stderr
