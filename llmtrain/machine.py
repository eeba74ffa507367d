"""What the machine gives this process; imports nothing heavy."""

from __future__ import annotations

import math
import os
import platform

# A process that lost another one; that one's own code says why.
EXIT_LOST = 1


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


def tell_launcher(code: int) -> None:
    """torchrun turns every failure into 1; launch/local.sh reads the real code from this file.

    The first rank's counts, but where it was left waiting or lost a rank that failed, that one's.
    """
    file = os.environ.get("LLMTRAIN_EXIT_FILE")
    if not file:
        return
    with open(file, "r+") as out:
        first = os.environ.get("RANK", "0") == "0" and code != EXIT_LOST
        if first or out.read().strip() in ("", str(EXIT_LOST)):
            out.seek(0)
            out.truncate()
            out.write(str(code))


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
