"""Which rank the others wait for: own work and waiting of every rank between two log lines.

Waiting is the time that the main thread spends in ``Work.wait``, through which every collective of
torch goes that a process waits for on the CPU: all of gloo's, and with NCCL the exchange over gloo
in front of each step. Own work is the rest of the time. On a GPU most waiting happens inside the
step's kernels and does not show; there own work is the time of a few fixed products, which finds a
GPU that is slow (hot, throttled, shared) under any layout. A rank whose process is late to the step
(its data, its hooks) is found by what the others wait for it in the exchange in front of each step.
"""

from __future__ import annotations

import statistics
import threading
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch._C._distributed_c10d import Work

from llmtrain.parallel import World

# Longer than the turns that processes take on a GPU which they share, a few milliseconds.
_PROBES, _SIDE = 16, 4096


@dataclass(frozen=True)
class Stragglers:
    """Seconds of every rank since the last log line, by rank.

    own: work, on a GPU of the fixed products; waited: for others; busy: all but waiting, on a CPU
    the same as own.
    """

    own: list[float]
    waited: list[float]
    busy: list[float]

    @property
    def slowest(self) -> int:
        """The rank whose factor is the largest; of equal ones that with the most work."""
        factors = self.factors()
        return max(range(len(self.own)), key=lambda rank: (factors[rank], self.own[rank]))

    @property
    def awaited(self) -> int:
        """The rank that waits least, and so is waited for."""
        return min(range(len(self.waited)), key=lambda rank: self.waited[rank])

    def factors(self) -> list[float]:
        """Of each rank: how many times the median its work is, or what it does but wait.

        1 where that is within a twentieth of the time.
        """
        spent = max(busy + waited for busy, waited in zip(self.busy, self.waited, strict=True))
        kinds = [(self.busy, 0.05 * spent)]
        if self.own != self.busy:
            kinds.append((self.own, 0.05 * max(self.own)))
        found = [1.0] * len(self.own)
        for times, least in kinds:
            middle = statistics.median_low(times)
            for rank, seconds in enumerate(times):
                if seconds - middle > least:
                    found[rank] = max(found[rank], seconds / middle)
        return found

    def slow(self, factor: float) -> list[int]:
        """Ranks that take more than ``factor`` times the median."""
        return [rank for rank, own in enumerate(self.factors()) if own > factor]

    def record(self) -> dict[str, float]:
        """As numbers for the metrics. factor: that of the slowest rank, as the event says it."""
        return {
            "own_median": statistics.median_low(self.own),
            "own_most": max(self.own),
            "busy_median": statistics.median_low(self.busy),
            "busy_most": max(self.busy),
            "slowest": self.slowest,
            "factor": self.factors()[self.slowest],
            "waited_median": statistics.median_low(self.waited),
            "waited_least": self.waited[self.awaited],
            "awaited": self.awaited,
        }


class Stopwatch:
    """Measures this rank while it trains."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._whole = self._waited = 0.0
        self._since: float | None = None
        self._before: Any = None

    def begin(self) -> None:
        """Measure from now on; nothing where this process is alone."""
        if self._world.size == 1 or self._before is not None:
            return
        thread, self._before = threading.get_ident(), Work.wait
        before = self._before

        def wait(work: Work, *args: Any, **kwargs: Any) -> Any:
            if self._since is None or threading.get_ident() != thread:
                return before(work, *args, **kwargs)
            began = time.perf_counter()
            try:
                return before(work, *args, **kwargs)
            finally:
                self._waited += time.perf_counter() - began

        setattr(Work, "wait", wait)  # noqa: B010
        self.resume()

    def end(self) -> None:
        """Measure no more."""
        if self._before is not None:
            setattr(Work, "wait", self._before)  # noqa: B010
            self._before = None

    def pause(self) -> None:
        """What follows is not training."""
        if self._since is not None:
            self._whole += time.perf_counter() - self._since
            self._since = None

    def resume(self) -> None:
        """Training goes on."""
        if self._before is not None and self._since is None:
            self._since = time.perf_counter()

    def read(self) -> Stragglers | None:
        """Since the last reading; None where this process is alone. Collective."""
        if self._before is None:
            return None
        self.pause()
        size, rank = self._world.size, self._world.rank
        own = busy = self._whole - self._waited
        if self._world.device.type == "cuda":
            own = probe(self._world.device)
        slots = [0.0] * (3 * size)
        slots[rank::size] = own, self._waited, busy
        self._whole = self._waited = 0.0
        # Who comes late to this exchange is waited for as well: that counts for the next reading.
        self.resume()
        slots = self._world.sum(slots)
        return Stragglers(slots[:size], slots[size : 2 * size], slots[2 * size :])


def probe(device: torch.device) -> float:
    """Seconds of a few products of 4096 x 4096 in bf16 on this GPU."""
    a = torch.ones(_SIDE, _SIDE, device=device, dtype=torch.bfloat16)
    event: Any = torch.cuda.Event
    start, end = (event(enable_timing=True) for _ in range(2))
    a @ a  # the library's start-up, once a process
    start.record()
    for _ in range(_PROBES):
        a @ a
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3
