"""What a run prints: a short preamble, one line per logged step, a bar on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


def human(number: float) -> str:
    """1234567 -> '1.23M'."""
    scales = (
        (1e21, "Z"),
        (1e18, "E"),
        (1e15, "P"),
        (1e12, "T"),
        (1e9, "B"),
        (1e6, "M"),
        (1e3, "k"),
    )
    for scale, letter in scales:
        if abs(number) >= scale:
            return f"{number / scale:.3g}{letter}"
    return f"{number:.0f}" if float(number).is_integer() else f"{number:.3g}"


def gib(n_bytes: float) -> str:
    """Bytes as GiB or MiB."""
    return f"{n_bytes / 2**30:.2f}GiB" if n_bytes >= 2**30 else f"{n_bytes / 2**20:.0f}MiB"


def size(n_bytes: float) -> str:
    """Bytes in the unit that leaves one to four digits before the point, in powers of 1024."""
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if n_bytes >= 1024**power:
            return f"{n_bytes / 1024**power:.2f} {unit}"
    return f"{n_bytes:.0f} B"


def clock(seconds: float | None) -> str:
    """Seconds as h:mm:ss; '-' when unknown."""
    if seconds is None:
        return "-"
    total = int(seconds + 0.5)
    return f"{total // 3600}:{total // 60 % 60:02d}:{total % 60:02d}"


def table(rows: Sequence[Sequence[str]], indent: str = "  ") -> list[str]:
    """Rows as aligned lines: first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append(indent + "  ".join(cells))
    return lines


class Console:
    """Prints on the main rank only. A progress bar where stdout is a terminal."""

    def __init__(self, active: bool, total_steps: int) -> None:
        self._active = active
        self._total = total_steps
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def say(self, text: str = "") -> None:
        """Print ``text``."""
        if not self._active:
            return
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, flush=True)

    def warn(self, text: str) -> None:
        """Print a warning on stderr."""
        if self._active:
            print(f"llmtrain: warning: {text}", file=sys.stderr, flush=True)

    def start_bar(self, done: int) -> None:
        """Show the bar, with ``done`` steps made; only on a terminal."""
        if not (self._active and sys.stdout.isatty()):
            return
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self._bar = Progress(
            TextColumn("training"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total} steps"),
            TimeRemainingColumn(),
            transient=True,
        )
        self._task = self._bar.add_task("train", total=self._total, completed=done)
        self._bar.start()

    def advance(self, step: int) -> None:
        """``step`` steps are done."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step)

    def stop_bar(self) -> None:
        """Take the bar away; lines go on."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def step_line(record: dict[str, object], total_steps: int, eta: float | None) -> str:
    """One logged step: step, tokens, loss, grad norm, lr, tokens/s, MFU, memory, ETA."""
    mfu = "n/a" if record["mfu"] is None else f"{100 * _number(record, 'mfu'):.1f}%"
    tokens, rate = human(_number(record, "tokens")), human(_number(record, "tokens_per_second"))
    parts = (
        f"step {record['step']:>{len(str(total_steps))}}/{total_steps}",
        f"tokens {tokens:>6}",
        f"loss {_number(record, 'loss'):.4f}",
        f"grad norm {_number(record, 'grad_norm'):.3f}",
        f"lr {_number(record, 'lr'):.2e}",
        f"{rate:>5} tok/s",
        f"MFU {mfu}",
        f"mem {gib(_number(record, 'memory_bytes'))}",
        f"ETA {clock(eta)}",
    )
    return " | ".join(parts)


def _number(record: dict[str, object], key: str) -> float:
    value = record[key]
    assert isinstance(value, (int, float))
    return float(value)
