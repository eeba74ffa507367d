"""The helper that starts ranks: results, errors with tracebacks, dead and stuck ranks."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist
from helpers.ranks import RankError, run_ranks

pytestmark = pytest.mark.dist


def test_results_come_back_in_rank_order() -> None:
    # A parallel region in the parent first: its OpenMP pool must not hang the forked ranks.
    torch.ones(600, 600) @ torch.ones(600, 600)

    def body(rank: int, scale: float) -> tuple[int, torch.Tensor]:
        tensor = torch.full((700, 700), scale * (rank + 1))
        dist.all_reduce(tensor)
        return rank, (tensor @ tensor)[0, :2]

    results = run_ranks(3, body, 2.0)
    assert [rank for rank, _ in results] == [0, 1, 2]
    assert all(torch.equal(tensor, torch.full((2,), 700 * 144.0)) for _, tensor in results)


def test_an_exception_brings_its_traceback_and_frees_the_others() -> None:
    def body(rank: int) -> None:
        if rank == 1:
            raise ValueError("odd one out")
        dist.barrier()

    with pytest.raises(RankError, match=r"(?s)\Arank 1: Traceback.*odd one out"):
        run_ranks(2, body)


@pytest.mark.parametrize(
    ("action", "words"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), r"died without a word \(exit code -9\)"),
        (lambda: time.sleep(60), "did not finish in time"),
    ],
)
def test_dead_and_stuck_ranks_are_reported(action, words: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(RankError, match=words):
        run_ranks(2, lambda rank: action() if rank == 0 else None, timeout=2.0, init=False)
