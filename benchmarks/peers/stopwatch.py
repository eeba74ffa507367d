"""The stopwatch of every contender; nothing but the standard library."""

from __future__ import annotations

import time


class Stopwatch:
    """When each optimizer step ended, by the clock and by the processor, and its loss in nats.

    begun: both clocks when the first step began.
    """

    def __init__(self) -> None:
        self.begun = (0.0, 0.0)
        self.stamps: list[float] = []
        self.cpu: list[float] = []
        self.losses: list[float] = []

    def begin(self) -> None:
        """The first optimizer step begins."""
        self.begun = (time.time(), time.process_time())

    def stamp(self) -> None:
        """An optimizer step has ended."""
        self.stamps.append(time.time())
        self.cpu.append(time.process_time())
