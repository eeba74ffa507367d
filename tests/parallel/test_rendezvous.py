"""Processes that are started again under one launcher find each other, not the ones before."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from llmtrain.parallel.rendezvous import agree

SOON = timedelta(seconds=10)


def test_attempts_of_other_sizes_agree_on_names_of_their_own() -> None:
    store = dist.HashStore()
    names = []
    for size in (3, 3, 1, 4, 2):
        with ThreadPoolExecutor(size) as pool:
            found = list(pool.map(lambda rank, n=size: agree(store, rank, n, SOON), range(size)))
        assert len(set(found)) == 1
        names.append(found[0])
    assert len(set(names)) == len(names)


def test_a_process_that_does_not_come_is_named() -> None:
    store = dist.HashStore()
    # What an earlier attempt left does not stand for it.
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda rank: agree(store, rank, 3, SOON), range(3)))
    with pytest.raises(RuntimeError, match=r"rank 1 did not come in time"):
        agree(store, 0, 3, timedelta(seconds=0.2))
