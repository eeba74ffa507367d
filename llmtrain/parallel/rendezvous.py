"""A key-value store of this attempt's own, when torchrun starts the processes again.

torchrun's agent keeps its store over restarts, and so the addresses that the processes of the
attempt before have written into it: gloo would read them and connect to processes that are gone.
How often an agent has restarted its processes does not tell attempts apart, because agents of
several nodes may count differently. So the processes agree on a name: each greets rank 0 with a
number that nobody has used, and rank 0 answers to every greeting with the name it has drawn, until
every process has taken it.
"""

from __future__ import annotations

import os
import secrets
import time
from datetime import timedelta

from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

_PAUSE = 0.02
_ROOT = "llmtrain/attempt"


def restarts_possible() -> bool:
    """Whether torchrun started this process, keeps its store and may start it again."""
    kept = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return kept and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"


def attempt_store(timeout: timedelta) -> Store:
    """The launcher's store under a name of this attempt's own; all processes call it.

    Raises RuntimeError when not all of them come within ``timeout``.
    """
    store, rank, size = next(rendezvous("env://", timeout=timeout))
    return PrefixStore(f"{_ROOT}/{agree(store, rank, size, timeout)}", store)


def agree(store: Store, rank: int, size: int, timeout: timedelta) -> str:
    """A name that all ``size`` processes get and that ``store`` has not seen before."""
    end = time.monotonic() + timeout.total_seconds()
    if rank != 0:
        greeting = secrets.token_hex(8)
        store.set(f"{_ROOT}/greeting/{rank}", greeting)
        answer = f"{_ROOT}/answer/{greeting}"
        while not store.check([answer]):
            _wait(end, "rank 0")
        name = str(store.get(answer).decode())
        store.set(f"{_ROOT}/{name}/taken/{rank}", "1")
        return name
    name, left, answered = secrets.token_hex(8), set(range(1, size)), set()
    while left:
        for other in sorted(left):
            key = f"{_ROOT}/greeting/{other}"
            if store.check([key]):
                greeting = store.get(key).decode()
                if greeting not in answered:  # or it is one of an earlier attempt
                    store.set(f"{_ROOT}/answer/{greeting}", name)
                    answered.add(greeting)
            if store.check([f"{_ROOT}/{name}/taken/{other}"]):
                left.discard(other)
        if left:
            _wait(end, f"rank {min(left)}")
    return name


def _wait(end: float, whom: str) -> None:
    if time.monotonic() > end:
        raise RuntimeError(f"{whom} did not come in time")
    time.sleep(_PAUSE)
