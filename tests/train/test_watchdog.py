"""The watchdog names the rank that holds a run up, and nobody else; stragglers are named."""

from __future__ import annotations

import ctypes
import json
import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from helpers.ranks import run_ranks
from helpers.tiny import records, tiny_config

from llmtrain.config import load_config
from llmtrain.config.watch import WatchdogConfig
from llmtrain.parallel import World, init_world
from llmtrain.report.summary import _ranks as slowest_rank
from llmtrain.train import stragglers
from llmtrain.train.run import train
from llmtrain.train.stragglers import Stopwatch, Stragglers
from llmtrain.train.watchdog import PHASES, Heartbeat, Watchdog, verdict


def beat(rank: int, step: int, phase: str, seconds: float = 9.0, **more: object) -> Heartbeat:
    return Heartbeat(rank, "here", 1, 5, step, phase, seconds, **more)  # type: ignore[arg-type]


def said(beats: list[Heartbeat], silent: list[int], size: int) -> str:
    return verdict({b.rank: b for b in beats}, silent, size, Path("watch"))


def test_the_rank_that_came_least_far_is_named() -> None:
    waiting = [beat(r, 7, "exchange", waiting=True) for r in (0, 1, 3)]
    text = said([*waiting, beat(2, 7, "data", where="loader.py:8 (read)")], [], 4)
    assert text.startswith("rank 2 of 4 stood in data after step 7 for 9 s at loader.py:8 (read)")


def test_of_ranks_in_one_phase_those_that_do_not_wait_are_named() -> None:
    same = [beat(r, 7, "forward and backward", waiting=r != 1) for r in range(3)]
    assert said(same, [], 3).startswith("rank 1 of 3 stood in forward and backward")
    # The one that is further than those who wait is not the one to blame for being busy.
    ahead = [beat(0, 8, "data", 1), beat(1, 7, "update", 9), beat(2, 7, "norm", waiting=True)]
    assert said(ahead, [], 3).startswith("rank 1 of 3 stood in update after step 7")


def test_ranks_without_a_heartbeat_come_first() -> None:
    others = [beat(0, 7, "norm", waiting=True), beat(3, 6, "data")]
    text = said([*others, beat(2, 5, "log")], [2, 1], 4)
    assert text.startswith("ranks 1, 2 of 4 gave no sign of life, last seen after step 5 in log")
    many = said(others, list(range(20, 40)), 40)
    assert "20, 21, 22, 23, 24, 25, 26, 27 and 12 more of 40" in many


def test_where_all_wait_nobody_is_blamed() -> None:
    assert said([beat(r, 3, "norm", waiting=True) for r in range(4)], [], 4).startswith("all 4 ")


def test_phases_have_their_own_allowances(tmp_path: Path) -> None:
    now = [0.0]
    cfg = WatchdogConfig(seconds=10, start=100, evaluation=1000, checkpoint=10000)
    dog = Watchdog(cfg, tmp_path, clock=lambda: now[0])
    allowances = {phase: dog.allowance(phase) for phase in PHASES}
    assert allowances["evaluation"] == 1000 and allowances["checkpoint"] == 10000
    assert allowances["forward and backward"] == allowances["start"] == 100
    dog.at("exchange")
    assert dog.allowance("exchange") == 100
    dog.at("hooks", 1)
    assert dog.allowance("exchange") == 10
    now[0] += 9
    dog.at("data")
    now[0] += 3
    # The time in a phase counts, not that since the last step.
    assert dog.write().seconds == 3
    dog.begin(1)
    assert dog.allowance("data") == 100


CFG = WatchdogConfig(seconds=0.6, start=0.6, evaluation=0.6, checkpoint=0.6)


def hang(rank: int, folder: Path, how: str) -> tuple[list[int], str]:
    """Rank 1 hangs until it is named; codes that the watchdog wanted to leave with, and stacks."""
    codes: list[int] = []
    stacks = folder / f"stacks-rank-{rank}.txt"

    def leave(code: int) -> None:
        codes.append(code)
        if rank == 0 and how == "no thread runs":
            os.close(os.open(folder / "fifo", os.O_WRONLY))

    with Watchdog(CFG, folder, (rank, 0, 2, 2), leave=leave) as dog:
        dog.at("hooks", 4)
        dog.at("data")
        if rank == 1:
            stand_still(how, folder, stacks)
        dog.at("exchange")
        dist.all_reduce(torch.ones(1))
    return codes, stacks.read_text("utf-8")


def stand_still(how: str, folder: Path, stacks: Path) -> None:
    if how == "no thread runs":
        # C code that holds Python's lock until rank 0 opens the other end.
        ctypes.PyDLL(None).open(str(folder / "fifo").encode(), os.O_RDONLY)
        return
    while not ((folder / "alarm.json").exists() and stacks.stat().st_size):
        time.sleep(0.02 if how == "sleeps" else 0)


@pytest.mark.dist
@pytest.mark.parametrize("how", ["sleeps", "loops", "no thread runs"])
def test_a_rank_that_hangs_is_named_with_its_stack(
    how: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(tmp_path / "fifo")
    results = run_ranks(2, hang, tmp_path, how)
    text = json.loads((tmp_path / "alarm.json").read_text("utf-8"))["text"]
    blamed = "gave no sign of life" if how == "no thread runs" else "stood in data after step 4"
    assert text.startswith(f"rank 1 of 2 {blamed}")
    assert capfd.readouterr().err.count("watchdog: rank 1") == 1
    assert results[0][0] == [4]
    assert "all_reduce" in results[0][1]
    assert "stand_still" in results[1][1]
    # The next start takes note of it, once.
    for expected in (text, None):
        with Watchdog(WatchdogConfig(), tmp_path) as dog:
            assert dog.before == expected


def lag(rank: int, device: str) -> list[tuple[list[float], list[float], list[float]]]:
    world = World(rank, 3, rank, torch.device(device), dist.new_group(backend="gloo"))
    stopwatch, found = Stopwatch(world), []
    stragglers.probe = lambda device: 0.005 if rank == 2 else 0.001  # type: ignore[assignment]
    stopwatch.begin()
    for factor in (1.0, 3.0):
        for _ in range(3):
            time.sleep(0.02 * (factor if rank == 1 else 1.0))
            world.sum([1.0])
        stopwatch.pause()
        time.sleep(0.3)  # an evaluation
        stopwatch.resume()
        read = stopwatch.read()
        assert read is not None
        found.append((read.own, read.waited, read.busy))
    stopwatch.end()
    return found


@pytest.mark.dist
def test_own_work_and_waiting_of_every_rank() -> None:
    results = run_ranks(3, lag, "cpu")
    assert results[0] == results[1] == results[2]
    even, uneven = (Stragglers(*times) for times in results[0])
    assert uneven.slowest == uneven.awaited == 1
    assert uneven.slow(1.5) == [1] and even.slow(4.0) == []
    assert uneven.own[1] > 0.18 and min(uneven.waited[0], uneven.waited[2]) > 0.06
    assert max(*even.own, *uneven.own) < 0.3


@pytest.mark.dist
def test_on_gpus_own_work_is_the_probe_and_waiting_shows_a_late_host() -> None:
    """Rank 2 has the slow GPU, rank 1 is late to the step."""
    results = run_ranks(3, lag, "cuda:0")
    uneven = Stragglers(*results[0][1])
    assert uneven.own == [0.001, 0.001, 0.005]
    assert (uneven.slowest, uneven.awaited) == (2, 1)
    assert uneven.slow(1.5) == [1, 2]
    slow_gpu = uneven.factors()[2]
    assert slow_gpu == pytest.approx(5.0) and Stragglers(*results[0][0]).slow(4.0) == [2]


def train_late(rank: int, config: str) -> int:
    return train(load_config(config), init_world("cpu"))


@pytest.mark.dist
def test_a_rank_that_is_late_is_named_by_the_run(tmp_path: Path, corpus: Path) -> None:
    changes = {"train__duration": "5step", "eval__every": None, "log__every": 1}
    changes |= {"hooks": [{"use": "helpers.hooks:Late"}]}
    config = str(tiny_config(tmp_path, corpus, **changes))
    assert run_ranks(2, train_late, config) == [0, 0]
    run = tmp_path / "runs" / "tiny"
    (event,) = [e["text"] for e in records(run, "event") if e["text"].startswith("slow:")]
    assert event.startswith("slow: rank 1 (") and event.endswith("wait most for rank 1")
    noted = [record["ranks"] for record in records(run)]
    assert [ranks["slowest"] for ranks in noted][2:] == [1, 1, 1]
    factor = event.partition("(")[2].partition(" x)")[0]
    assert factor in [f"{ranks['factor']:.2f}" for ranks in noted]


def test_the_record_and_the_report_name_the_rank_that_the_event_does() -> None:
    """On GPUs: rank 2 has the most work of its own, rank 1 is late and slower by far."""
    ranks = Stragglers([1.0, 1.0, 1.2], [4.0, 0.5, 4.0], [1.0, 3.0, 1.0])
    record = ranks.record()
    assert ranks.slow(1.5) == [1] and record["slowest"] == 1
    assert record["factor"] == ranks.factors()[1] == 3.0
    assert (record["own_most"], record["busy_median"], record["busy_most"]) == (1.2, 1.0, 3.0)
    earlier = {"slowest": 2, "own_most": 1.2, "own_median": 1.0}
    for noted, told in ((record, "1 (3.00 x the median, 100%"), (earlier, "2 (1.20 x the median")):
        run = SimpleNamespace(steps=[{"ranks": noted}])
        ((_, text),) = slowest_rank(run)  # type: ignore[arg-type]
        assert text.startswith(told)
    # Nobody is slow: the one with the most work is named, and it is as the median.
    even = Stragglers([1.0, 1.01, 1.0], [0.0] * 3, [1.0, 1.01, 1.0]).record()
    assert (even["slowest"], even["factor"]) == (1, 1.0)
