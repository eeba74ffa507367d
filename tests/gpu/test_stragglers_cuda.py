"""Own work of a rank on a GPU: the time of fixed products, by CUDA events."""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from llmtrain.train.stragglers import probe

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
# Another process on the same GPU, as a job that was left behind: the two take turns.
HOG = """
import torch
a = torch.ones(8192, 8192, device="cuda", dtype=torch.bfloat16)
for i in range(10**9):
    a @ a
    if i == 50: print("busy", flush=True)
    if i % 50 == 0: torch.cuda.synchronize()
"""


def readings(times: int = 15) -> list[float]:
    """Seconds of the fixed products on this GPU."""
    return [probe(torch.device("cuda", 0)) for _ in range(times)]


@pytest.fixture
def alone() -> list[float]:
    return readings()


@pytest.fixture
def hog(alone: list[float]) -> Iterator[None]:
    process = subprocess.Popen([sys.executable, "-c", HOG], stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == b"busy\n"
        yield
    finally:
        process.kill()
        process.wait()


def test_the_probe_is_the_products_and_nothing_else(alone: list[float]) -> None:
    """16 x 2 x 4096^3 operations; the first reading has no start-up of the library in it."""
    middle = statistics.median(alone)
    assert 2.2e12 / 5e15 < middle < 2.2e12 / 5e12
    assert alone[0] < 20 * middle


def test_a_gpu_that_is_shared_is_slow(alone: list[float], hog: None) -> None:
    # Some readings may fall into a turn of our own.
    assert statistics.fmean(readings()) > 1.3 * statistics.median(alone)
