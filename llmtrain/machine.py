"""What the machine gives this process; imports nothing heavy."""

from __future__ import annotations

import math
import os
import platform


def _cgroup_cores(root: str = "/sys/fs/cgroup") -> float:
    """CPU quota of this process's control group in cores; infinity when there is none."""
    try:
        with open(f"{root}/cpu.max") as quota:
            limit, period = quota.read().split()
    except (OSError, ValueError):
        return math.inf
    return math.inf if limit == "max" else int(limit) / int(period)


def usable_cores() -> int:
    """Cores this process may use: affinity mask and control group quota, at least 1."""
    if hasattr(os, "sched_getaffinity"):
        allowed = len(os.sched_getaffinity(0))
    else:
        allowed = os.cpu_count() or 1
    return max(1, math.floor(min(allowed, _cgroup_cores())))


def processor_name() -> str:
    """The model of the CPU as Linux tells it, such as "AMD EPYC 7763"; elsewhere its family."""
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
