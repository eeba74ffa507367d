"""Is this node fit to train? What is looked at before a job begins, node by node and across nodes.

Bandwidth of an all-reduce is the bus bandwidth of nccl-tests: ``2 (n - 1) / n * bytes / seconds``,
which does not depend on the number of ranks n when the links are what limits.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from llmtrain.parallel import close_world, init_world

GIB = 2**30
LOW_DISK = 5 * GIB
# A GPU with more in use, or busier, is not ours alone. A driver holds some hundred MiB itself.
BUSY_MEMORY, BUSY_PERCENT = 0.05, 10
CLOCK_SECONDS = 5.0
_QUERY = "index,memory.used,memory.total,utilization.gpu,ecc.errors.uncorrected.volatile.total"
_BYTES = {"cpu": 8 * 2**20, "cuda": 256 * 2**20}
_REPEATS = 5


@dataclass
class NodeReport:
    """What was found on a node: lines to print, and what is wrong with the node."""

    lines: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class AllReduce:
    """A measured sum over all ranks. gigabytes_per_second: bus bandwidth, 10^9 bytes."""

    ranks: int
    bytes: int
    seconds: float
    gigabytes_per_second: float


def check_node(gpus: int, folder: Path) -> NodeReport:
    """Look at this node alone: its GPUs, its memory, the disk of ``folder`` and the clock.

    gpus: how many must be visible and idle; 0: none is looked for. folder: of the run, where
    checkpoints will be written; it is made where it is missing.
    """
    report = NodeReport()
    checks: list[Callable[[], str]] = [_memory, lambda: _disk(folder), lambda: _clock(folder)]
    if gpus:
        checks.insert(0, lambda: _gpus(gpus))
    for check in checks:
        try:
            report.lines.append(check())
        except (Unfit, OSError, subprocess.SubprocessError) as error:
            report.faults.append(str(error))
    return report


class Unfit(Exception):
    """What is wrong with a node, in one line."""


def _gpus(wanted: int) -> str:
    if shutil.which("nvidia-smi") is None:
        raise Unfit(f"GPUs: {wanted} wanted, and there is no nvidia-smi")
    command = ["nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    if done.returncode != 0:
        raise Unfit(f"GPUs: nvidia-smi fails: {' '.join((done.stderr or done.stdout).split())}")
    rows = [[cell.strip() for cell in row.split(",")] for row in done.stdout.splitlines() if row]
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if allowed is not None and all(part.isdecimal() for part in allowed.split(",") if part):
        rows = [row for row in rows if row[0] in allowed.split(",")]
    if len(rows) < wanted:
        raise Unfit(f"GPUs: {len(rows)} of {wanted} are visible")
    if odd := [row for row in rows if len(row) != len(_QUERY.split(","))]:
        raise Unfit(f"GPUs: nvidia-smi says {', '.join(odd[0])!r}")
    free = []
    for index, used, total, busy, errors in rows:
        # A GPU that shares the processor's memory says [N/A]: _memory looks at that one.
        known = used.isdecimal() and total.isdecimal()
        if known and int(used) > BUSY_MEMORY * int(total):
            raise Unfit(f"GPU {index}: {used} of {total} MiB are in use by someone else")
        if busy.isdecimal() and int(busy) > BUSY_PERCENT:
            raise Unfit(f"GPU {index}: {busy}% busy with someone else's work")
        if errors.isdecimal() and int(errors) > 0:
            raise Unfit(f"GPU {index}: {errors} uncorrected memory errors since it was reset")
        if known:
            free.append((int(total) - int(used)) / 1024)
    room = f"{min(free):.1f} GiB free on the fullest" if free else "memory not told"
    return f"{len(rows)} GPUs, idle, {room}"


def _memory() -> str:
    values = {}
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        name, _, rest = line.partition(":")
        values[name] = int(rest.split()[0]) / 2**20
    available, total = values["MemAvailable"], values["MemTotal"]
    if available < 0.1 * total:
        raise Unfit(f"memory: only {available:.1f} of {total:.1f} GiB are available")
    return f"memory: {available:.1f} of {total:.1f} GiB available"


def _disk(folder: Path) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < LOW_DISK:
        raise Unfit(f"disk: {free / GIB:.1f} GiB free in {folder}; checkpoints need room")
    return f"disk: {free / GIB:.1f} GiB free in {folder}"


def _clock(folder: Path) -> str:
    """This node's clock against that of the file server, and a write to it."""
    before = time.time()
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".health-") as file:
        file.write(b"x")
        file.flush()
        written = os.stat(file.name).st_mtime
    after = time.time()
    off = max(before - written, written - after, 0.0)
    if off > CLOCK_SECONDS:
        raise Unfit(f"clock: {off:.0f} s off the clock of the file system at {folder}")
    return "clock: as the file system's"


def check_world_health(
    cuda: bool, fit: bool, least: float | None = None
) -> tuple[list[str], list[str]]:
    """Join the other processes and measure the links: (lines, faults), the same on all ranks.

    fit: whether this process found its node fit; where one did not, nothing is measured. least:
    bus bandwidth in 10^9 bytes per second below which it is a fault. Raises EnvironmentFault where
    the processes do not find each other in five minutes.
    """
    # By gloo first: a GPU that is not idle or not there is told before NCCL meets it.
    world = init_world("cpu", timeout_minutes=5.0)
    fit = fit and (not cuda or torch.cuda.device_count() > world.local_rank)
    try:
        own = [0.0] * world.size
        own[world.rank] = float(not fit)
        unfit = [rank for rank, bad in enumerate(world.sum(own)) if bad]
        if unfit:
            return [], [f"the nodes of ranks {', '.join(map(str, unfit))} are not fit"]
        found = measure_all_reduce("cuda" if cuda else "cpu", world.local_rank)
        said = (
            f"all-reduce of {found.bytes / 2**20:.0f} MiB over {found.ranks} ranks: "
            f"{found.gigabytes_per_second:.2f} GB/s (bus bandwidth), {found.seconds * 1e3:.1f} ms"
        )
        # Every rank has its own time: the slowest one's counts, or they would disagree.
        slowest = world.max([-found.gigabytes_per_second])[0] * -1.0
        if least is not None and slowest < least:
            return [said], [f"all-reduce: {slowest:.2f} GB/s is less than {least:g}"]
        return [said], []
    except Unfit as fault:
        return [], [str(fault)]
    except RuntimeError as error:  # of gloo and NCCL: a link or a rank that is gone
        return [], [f"all-reduce: {str(error).strip().partition(chr(10))[0]}"]
    finally:
        close_world()


def measure_all_reduce(device: str, local_rank: int = 0) -> AllReduce:
    """Sum a tensor over all ranks of the joined world, a few times; the median is reported.

    device: "cpu" (gloo) or "cuda" (NCCL, on the GPU ``local_rank``). All ranks call it. Raises
    Unfit on every rank where a sum is wrong or the ranks' clocks disagree.
    """
    ranks, rank = dist.get_world_size(), dist.get_rank()
    group = None
    if device == "cuda":
        torch.cuda.set_device(local_rank)
        group = dist.new_group(backend="nccl", timeout=timedelta(minutes=5))
    size = _BYTES[device]
    value = torch.empty(size // 4, device=device)
    took = []
    wrong = 0.0
    for _ in range(_REPEATS + 1):
        value.fill_(rank + 1.0)
        _settle(device)
        begin = time.perf_counter()
        dist.all_reduce(value, group=group)
        if device == "cuda":
            torch.cuda.synchronize()
        took.append(time.perf_counter() - begin)
        wrong += float((value != ranks * (ranks + 1) / 2).sum())
    # Read right after a barrier, so that the spread is of the clocks and not of the arrivals.
    found = torch.zeros(ranks + 1, dtype=torch.float64)
    dist.barrier()
    found[rank], found[ranks] = time.time(), wrong
    dist.all_reduce(found)
    judge(found[:ranks].tolist(), float(found[ranks]))
    seconds = statistics.median(took[1:])  # the first one connects
    return AllReduce(ranks, size, seconds, bus_bandwidth(ranks, size, seconds))


def judge(clocks: list[float], wrong: float) -> None:
    """Raise Unfit where sums were wrong, or the clock of a rank (seconds) is off the median."""
    if wrong:
        raise Unfit(f"all-reduce: {wrong:.0f} numbers summed over {len(clocks)} ranks are wrong")
    middle = statistics.median(clocks)
    off = [abs(clock - middle) for clock in clocks]
    if max(clocks) - min(clocks) > CLOCK_SECONDS:
        rank = off.index(max(off))
        raise Unfit(f"clock: that of rank {rank} is {off[rank]:.0f} s off the others'")


def bus_bandwidth(ranks: int, size: int, seconds: float) -> float:
    """Bus bandwidth in 10^9 bytes per second of an all-reduce of ``size`` bytes."""
    return 2 * (ranks - 1) / ranks * size / seconds / 1e9


def _settle(device: str) -> None:
    """All ranks are here and the device has nothing left to do."""
    if device == "cuda":
        torch.cuda.synchronize()
    dist.barrier()
