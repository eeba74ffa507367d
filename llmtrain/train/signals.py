"""Termination signals: finish the step, save, leave with exit code 75."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any

_WATCHED = (signal.SIGTERM, signal.SIGUSR1)


class SignalWatch:
    """Remembers that SIGTERM or SIGUSR1 arrived; a context manager that restores handlers.

    The trainer adds ``pending`` to the reduction that every step makes anyway, so that all
    ranks stop after the same step even when only one was told. A second signal is not queued:
    after SIGTERM the saving goes on; SIGKILL still ends it, and the last checkpoint holds.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._previous: dict[int, Any] = {}

    @property
    def pending(self) -> float:
        """1.0 once a signal arrived, else 0.0."""
        return 1.0 if self.received else 0.0

    def __enter__(self) -> SignalWatch:
        for number in _WATCHED:
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
