"""What ``llmtrain doctor --health`` finds on a node and between nodes."""

from __future__ import annotations

import os
import shutil
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.ranks import run_ranks

from llmtrain.cli.main import main
from llmtrain.launch import health

GOOD = "0, 400, 81559, 0, 0\n1, 420, 81559, 3, [N/A]\n"


def node_with(folder: Path, monkeypatch: pytest.MonkeyPatch, rows: str) -> None:
    """A node whose nvidia-smi prints ``rows``."""
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\ncat <<'E'\n{rows}E\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_a_fit_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    node_with(tmp_path, monkeypatch, GOOD)
    monkeypatch.setenv("SLURMD_NODENAME", "n7")
    run = tmp_path / "runs" / "new"
    assert main(["doctor", "--health", "--gpus", "2", "--folder", str(run)]) == 0
    out = capsys.readouterr().out
    assert "n7: 2 GPUs, idle, 79.2 GiB free on the fullest\n" in out
    assert "NOT FIT" not in out
    assert list(run.iterdir()) == []


@pytest.mark.parametrize(
    ("rows", "fault"),
    [
        ("0, 400, 81559, 0, 0\n", "GPUs: 1 of 2 are visible"),
        (GOOD.replace("420", "41000"), "GPU 1: 41000 of 81559 MiB are in use by someone else"),
        (GOOD.replace("0, 0\n", "97, 0\n", 1), "GPU 0: 97% busy with someone else's work"),
        (GOOD.replace("0, 0\n", "0, 4\n", 1), "GPU 0: 4 uncorrected memory errors"),
        ("Unable to say\nmore\n", "GPUs: nvidia-smi says 'Unable to say'"),
    ],
)
def test_a_gpu_that_is_not_fit_is_named(
    rows: str,
    fault: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    node_with(tmp_path, monkeypatch, rows)
    assert main(["doctor", "--health", "--gpus", "2", "--folder", str(tmp_path)]) == 2
    assert f"NOT FIT: {fault}" in capsys.readouterr().out


def test_a_gpu_that_does_not_tell_its_memory_is_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node_with(tmp_path, monkeypatch, "0, [N/A], [N/A], 0, [N/A]\n")
    report = health.check_node(1, tmp_path)
    assert report.faults == []
    assert report.lines[0] == "1 GPUs, idle, memory not told"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert health.check_node(1, tmp_path).faults == ["GPUs: 0 of 1 are visible"]


def test_a_full_disk_and_a_wrong_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=3 << 30)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() - 90)
    first, second = health.check_node(0, tmp_path).faults
    assert first.startswith(f"disk: 3.0 GiB free in {tmp_path}")
    assert second.startswith("clock: 90 s off")


def test_options_of_the_check_stand_with_it_only(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--gpus", "8"]) == 2
    assert "--gpus goes with --health" in capsys.readouterr().err


def world(rank: int, port: int, fit: bool, least: float | None) -> tuple[list[str], list[str]]:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return health.check_world_health(False, fit or rank == 0, least)


@pytest.mark.parametrize(
    ("fit", "least", "fault"),
    [
        (True, None, None),
        (False, None, "the nodes of ranks 1 are not fit"),
        (True, 1e6, "GB/s is less than 1e+06"),
    ],
)
def test_two_ranks_agree(fit: bool, least: float | None, fault: str | None) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    first, second = run_ranks(2, world, port, fit, least, init=False)
    assert first[1] == second[1]
    if fault is None:
        assert first[1] == []
        assert first[0][0].startswith("all-reduce of 8 MiB over 2 ranks: ")
    else:
        assert fault in first[1][0]


def spoiled(rank: int, port: int) -> tuple[list[str], list[str]]:
    """As ``world``, with one number of the sum wrong on rank 1."""
    real = health.dist.all_reduce

    def all_reduce(value: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        real(value, *args, **kwargs)
        if rank == 1 and value.numel() > 1000:
            value[77] += 1

    health.dist.all_reduce = all_reduce
    return world(rank, port, True, None)


def test_a_sum_that_is_wrong_on_one_rank_is_told_on_all() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for lines, faults in run_ranks(2, spoiled, port, init=False):
        assert lines == []
        assert faults == ["all-reduce: 6 numbers summed over 2 ranks are wrong"]


def test_the_bandwidth_is_that_of_the_bus() -> None:
    # A ring sends and receives 2 (n - 1) / n of the tensor over every link.
    assert health.bus_bandwidth(2, 10**9, 0.5) == pytest.approx(2.0)
    assert health.bus_bandwidth(4, 8 * 10**9, 2.0) == pytest.approx(6.0)


def test_wrong_sums_and_clocks_are_faults() -> None:
    health.judge([100.0, 100.2, 101.0], 0.0)
    with pytest.raises(health.Unfit, match="7 numbers summed over 2 ranks are wrong"):
        health.judge([1.0, 1.0], 7.0)
    with pytest.raises(health.Unfit, match="that of rank 2 is 40 s off"):
        health.judge([100.0, 100.5, 140.0, 100.0], 0.0)
