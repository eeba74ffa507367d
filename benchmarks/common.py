"""What the benchmark scripts share: the machine, the versions, timing and the result file.

Every script writes ``benchmarks/results/<name>.json`` through ``write_result``, so that a number
never stands without the date, the machine, the versions and the commit it was measured with.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
ROOT = RESULTS.parent.parent


def cpu_model() -> str:
    """Name of the processor, as the kernel reports it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def memory_bytes() -> int | None:
    """Bytes of main memory, or None where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None


def usable_cores() -> int:
    """Cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def gpu_names() -> list[str]:
    """Names of the CUDA devices; empty without torch or without a device."""
    try:
        import torch
    except ImportError:
        return []
    if not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def machine() -> dict[str, Any]:
    """The machine in a few words: processor, usable cores, memory, devices, system."""
    return {
        "cpu": cpu_model(),
        "cores": usable_cores(),
        "memory_bytes": memory_bytes(),
        "gpus": gpu_names(),
        "system": f"{platform.system()} {platform.release()}",
        "load_average": [round(x, 2) for x in os.getloadavg()],
    }


def versions(*packages: str) -> dict[str, str | None]:
    """Installed versions of Python, torch, numpy and ``packages``; None for what is absent."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("torch", "numpy", *packages):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def git_commit() -> str | None:
    """Commit of the working tree, with ``+`` when tracked files differ from it."""

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", *args], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        return commit + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def context(*packages: str) -> dict[str, Any]:
    """What must stand beside every number: date, commit, machine, versions."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": git_commit(),
        "machine": machine(),
        "versions": versions(*packages),
    }


def seconds(work: Callable[[], object]) -> float:
    """Wall-clock seconds of one call."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Median, extremes and all the readings of one quantity."""
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "readings": list(values),
    }


def interleaved(
    contenders: dict[str, Callable[[], float]], rounds: int
) -> dict[str, dict[str, Any]]:
    """Readings of several contenders taken in turn, so that a slow minute hits all alike.

    Each callable returns one reading (a rate or a time); the result maps names to ``summary``.
    """
    readings: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, measure in contenders.items():
            readings[name].append(measure())
    return {name: summary(values) for name, values in readings.items()}


def write_result(
    name: str, result: dict[str, Any], *packages: str, out: Path | None = None
) -> Path:
    """Writes ``result`` with its context to ``benchmarks/results/<name>.json`` (or ``out``)."""
    path = out or RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**context(*packages), **result}, indent=2) + "\n")
    return path
