"""Run a function on several gloo ranks of this machine and collect what each returns.

    from helpers.ranks import run_ranks

    def body(rank: int, scale: float) -> float: ...   # torch.distributed is initialised inside
    results = run_ranks(4, body, 2.0)                  # [result of rank 0, ..., of rank 3]

Ranks are forked (0.05 s, against 1-2 s for spawn), so ``fn`` may be a closure and sees the
modules of the test. Each rank starts with one thread: OpenMP's pool does not survive a fork.
"""

from __future__ import annotations

import ctypes
import faulthandler
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from typing import Any

import torch
import torch.distributed as dist

GRACE_SECONDS = 5.0


class RankError(AssertionError):
    """A rank raised, died or ran out of time; the message holds the rank's own traceback."""


def run_ranks(
    world: int, fn: Callable[..., Any], *args: Any, timeout: float = 60.0, init: bool = True
) -> list[Any]:
    """Results of ``fn(rank, *args)`` on ``world`` ranks, in rank order.

    Results travel by pickle (tensors by value). init: join a gloo group first. The first rank
    that fails raises RankError here with its traceback; the others get a few seconds to fail as
    well and are then killed, as is everything after ``timeout`` seconds (whose stacks go to
    stderr).
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        links: list[Connection] = []
        processes: list[ForkProcess] = []
        for rank in range(world):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(
                target=_child,
                args=(theirs, rank, world, f"{folder}/store" if init else None, timeout, fn, args),
                daemon=True,
            )
            process.start()
            theirs.close()
            links.append(ours)
            processes.append(process)
        try:
            return _collect(links, processes, timeout)
        finally:
            for process in processes:
                process.join(0.2)
                if process.is_alive():
                    process.kill()
                process.join()
            for link in links:
                link.close()


def _collect(links: list[Connection], processes: list[ForkProcess], timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    errors: dict[int, tuple[float, str]] = {}
    open_links = {link: rank for rank, link in enumerate(links)}
    deadline = time.monotonic() + timeout
    while open_links and (left := deadline - time.monotonic()) > 0:
        for link in wait(list(open_links), left):
            assert isinstance(link, Connection)
            rank = open_links.pop(link)
            try:
                when, good, value = pickle.loads(link.recv_bytes())
            except EOFError:
                processes[rank].join(1.0)
                code = processes[rank].exitcode
                when, good = time.monotonic(), False
                value = f"died without a word (exit code {code})"
            if good:
                results[rank] = value
            else:
                errors[rank] = (when, value)
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
    for rank in open_links.values():
        errors[rank] = (time.monotonic(), "did not finish in time")
    if errors:
        # The earliest failure is the cause; the others were left waiting for that rank.
        ordered = sorted(errors.items(), key=lambda item: item[1])
        raise RankError("\n".join(f"rank {rank}: {text}" for rank, (_, text) in ordered))
    return [results[rank] for rank in range(len(links))]


def _child(
    link: Connection,
    rank: int,
    world: int,
    store: str | None,
    timeout: float,
    fn: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    _die_with_parent()
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, signal.SIG_DFL)
    faulthandler.dump_traceback_later(max(1.0, timeout - 1.0), file=2)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    try:
        if store is not None:
            dist.init_process_group(
                "gloo",
                init_method=f"file://{store}",
                rank=rank,
                world_size=world,
                timeout=timedelta(seconds=timeout),
            )
        answer = pickle.dumps((time.monotonic(), True, fn(rank, *args)))
        if store is not None:
            dist.barrier()
    except BaseException:
        answer = pickle.dumps((time.monotonic(), False, traceback.format_exc()))
    link.send_bytes(answer)
    link.close()
    sys.stdout.flush()
    sys.stderr.flush()
    # A gloo worker that still holds a tensor aborts an interpreter that finalises; skip that.
    os._exit(0)


def _die_with_parent() -> None:
    """Ask the kernel to kill this rank when the test process is killed (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
