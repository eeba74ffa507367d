"""torchrun across two hosts whose link is cut and one of which dies; see ``helpers.hosts``."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.hosts import Hosts, possible
from helpers.stored import bits
from helpers.tiny import llmtrain, make_corpus, records, tiny_config

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(not possible(), reason="no rights to make network namespaces"),
]
STEPS = 60
CHANGES: dict[str, Any] = {
    "train__duration": f"{STEPS}step",
    "model": {"d_model": 16, "n_layers": 1, "n_heads": 2, "d_ff": 32},
    "eval__every": None,
    "eval__samples": 2,
    "checkpoint__every": "5step",
    "hooks": [{"use": "helpers.hooks:Slow"}],
    "train__watchdog": {"seconds": 12, "evaluation": 12, "checkpoint": 12, "start": 60},
}


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run on two processes of one host, undisturbed; beside it the config."""
    folder = tmp_path_factory.mktemp("straight")
    config = tiny_config(folder, make_corpus(folder, documents=40), **CHANGES)
    assert llmtrain("train", str(config), ranks=2).returncode == 0
    return folder


def disturbed(straight: Path, folder: Path, disturb: Callable[[Hosts], None]) -> tuple[Path, Hosts]:
    """A run across the hosts, with ``disturb`` after ten steps; the run and what was said."""
    run = folder / "runs" / "tiny"
    with Hosts(folder) as hosts:
        hosts.torchrun("train", str(straight / "tiny.yaml"), f"out={folder / 'runs'}")
        end = time.monotonic() + 100
        while not (run / "metrics.jsonl").exists() or len(records(run)) < 10:
            assert hosts.agents[0].poll() is None and time.monotonic() < end, hosts.said(0)
            time.sleep(0.05)
        disturb(hosts)
        assert hosts.agents[0].wait(timeout=150) == 0, hosts.said(0)
    return run, hosts


def same_course(run: Path, straight: Path, exact: bool) -> None:
    """All steps once, the same samples of each source; losses equal, or to rounding."""
    ours, theirs = records(run), records(straight / "runs" / "tiny")
    assert [r["step"] for r in ours] == list(range(1, STEPS + 1))
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["loss"] == (other["loss"] if exact else pytest.approx(other["loss"], rel=1e-5))
        for name, source in other["sources"].items():
            assert mine["sources"][name]["tokens"] == source["tokens"]


def test_a_cut_shorter_than_the_timeout_costs_nothing(straight: Path, tmp_path: Path) -> None:
    def cut(hosts: Hosts) -> None:
        hosts.link(up=False)
        time.sleep(2)
        hosts.link(up=True)

    run, hosts = disturbed(straight, tmp_path, cut)
    assert "watchdog" not in hosts.said(0) + hosts.said(1)
    assert not [e for e in records(run, "event") if "resumed" in e["text"]]
    same_course(run, straight, exact=True)
    last = f"checkpoints/step-{STEPS:08d}"
    assert bits(run / last) == bits(straight / "runs" / "tiny" / last)


def test_a_cut_longer_than_the_timeout_is_said_and_the_run_goes_on(
    straight: Path, tmp_path: Path
) -> None:
    run, hosts = disturbed(straight, tmp_path, lambda hosts: hosts.link(up=False))
    said = hosts.said(0) + hosts.said(1)
    assert "watchdog: all 2 ranks have stood in" in said or "watchdog: rank" in said
    assert [e for e in records(run, "event") if "resumed" in e["text"]]
    same_course(run, straight, exact=False)


def test_a_host_that_dies_is_done_without(straight: Path, tmp_path: Path) -> None:
    """Elastic: fewer processes, the same global batches in the same order."""
    run, _ = disturbed(straight, tmp_path, lambda hosts: hosts.kill(1))
    assert [e for e in records(run, "event") if "resumed" in e["text"]]
    same_course(run, straight, exact=False)
