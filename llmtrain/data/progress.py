"""What a long preparation says: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

LINE_SECONDS = 10.0


class Progress:
    """Progress of one source; a context manager around ``update`` calls.

    total: bytes of input, None where unknown. say: prints one line.
    """

    def __init__(self, name: str, total: int | None, say: Callable[[str], None]) -> None:
        self._name = name
        self._total = total
        self._say = say
        self._start = self._spoke = time.monotonic()
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Progress:
        if sys.stdout.isatty():
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.fields[counts]}"),
                TimeRemainingColumn(),
                transient=True,
            )
            self._bar.start()
            self._task = self._bar.add_task(self._name, total=self._total, counts="")
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, read: int, documents: int, tokens: int) -> None:
        """``read`` bytes of input were taken, so many documents and tokens are done."""
        now = time.monotonic()
        rate = tokens / max(now - self._start, 1e-9)
        counts = f"{documents:,} documents, {human(tokens)} tokens, {human(rate)} tokens/s"
        if self._bar is not None:
            done = min(read, self._total) if self._total is not None else None
            self._bar.update(self._task, completed=done, counts=counts)
        elif now - self._spoke >= LINE_SECONDS:
            self._spoke = now
            share = f"{min(read / self._total, 1):.0%}, " if self._total else ""
            self._say(f"{self._name}: {share}{counts}")


def human(number: float) -> str:
    """``number`` with a suffix K, M, G or T and three digits."""
    for suffix in ("", "K", "M", "G", "T"):
        if abs(number) < 999.5 or suffix == "T":
            break
        number /= 1000
    return f"{number:.3g}{suffix}" if suffix else f"{number:.0f}"
