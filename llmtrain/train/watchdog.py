"""The watchdog: a step that hangs ends the run, with the rank and its Python stack named.

Every process writes a heartbeat from a thread of its own: ``RUN/watch/rank-N.json`` with step,
phase, how long it has been there and, when that is long, the line of code. Each phase has its
allowance (``train.watchdog``). The first process that finds its own used up reads the others'
heartbeats and says which ranks hold the run up; all of them write the stacks of all their threads
to ``RUN/watch/stacks-rank-N.txt`` and leave with exit code 4, upon which a launcher starts the run
again from its last checkpoint.

Who holds it up: ranks without a heartbeat (dead, frozen, or busy in code that lets no other thread
run); else those that are not waiting in a collective; of these the ones that came least far.
Heartbeats are compared by counting, never by clocks of different machines.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO

from llmtrain.config.watch import WatchdogConfig
from llmtrain.errors import EXIT_HANG
from llmtrain.machine import tell_launcher

# In the order in which a step goes through them.
PHASES = (
    *("start", "data", "exchange", "forward and backward", "norm", "loss", "update"),
    *("hooks", "log", "checkpoint", "evaluation", "end"),
)
_SLOWEST_BEAT, _FASTEST_BEAT = 10.0, 0.05
# A busy machine may keep a thread waiting so long.
_SHORTEST_SIGN = 1.5
# Frames of these are a wait for other ranks, or the machinery of it.
_WAITING = (f"{os.sep}torch{os.sep}distributed{os.sep}", f"parallel{os.sep}world.py")
_STOPWATCH = f"train{os.sep}stragglers.py"


@dataclass(frozen=True)
class Heartbeat:
    """Where a rank is. beat: counts up. seconds: in this phase so far. where: the line of code, and
    waiting: whether it waits for other ranks there; both only once a good part of the allowance is
    used up."""

    rank: int
    host: str
    pid: int
    beat: int
    step: int
    phase: str
    seconds: float
    where: str = ""
    waiting: bool = False

    @property
    def progress(self) -> tuple[int, int]:
        """Step and phase, comparable."""
        return self.step, PHASES.index(self.phase)


class Watchdog:
    """Watches this process; a context manager around the training loop.

    folder: ``RUN/watch``. ranks: (this one, first of this node, of this node, of all). leave:
    called with the exit code when it is over. clock: seconds, monotonic.
    """

    def __init__(
        self,
        cfg: WatchdogConfig,
        folder: Path,
        ranks: tuple[int, int, int, int] = (0, 0, 1, 1),
        leave: Callable[[int], None] = os._exit,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.cfg, self.folder, self._leave, self._clock = cfg, folder, leave, clock
        self.rank, first, here, self.size = ranks
        self._node = range(first, first + here)
        self.before: str | None = None
        self._at: tuple[int, str, float] = (0, "start", clock())
        self._beat, self._stepped = 0, False
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        self._main = threading.get_ident()
        self._stacks: IO[str] | None = None

    def at(self, phase: str, step: int | None = None) -> None:
        """This rank enters a phase; costs a clock reading. step: so many updates are made now."""
        self._stepped = self._stepped or step is not None
        self._at = (self._at[0] if step is None else step, phase, self._clock())

    def begin(self, step: int) -> None:
        """Training starts after update ``step``; the first step may take ``start`` seconds."""
        self._at, self._stepped = (step, "start", self._clock()), False

    @property
    def period(self) -> float:
        """Seconds between heartbeats."""
        assert self.cfg.seconds is not None
        shortest = min(self.cfg.seconds, self.cfg.start, self.cfg.evaluation, self.cfg.checkpoint)
        return min(_SLOWEST_BEAT, max(_FASTEST_BEAT, shortest / 20))

    def allowance(self, phase: str) -> float:
        """Seconds that a rank may stand still in a phase."""
        assert self.cfg.seconds is not None
        if phase in ("evaluation", "hooks"):
            return max(self.cfg.evaluation, self.cfg.seconds)
        if phase in ("checkpoint", "end"):
            return max(self.cfg.checkpoint, self.cfg.seconds)
        return self.cfg.seconds if self._stepped else max(self.cfg.start, self.cfg.seconds)

    def __enter__(self) -> Watchdog:
        if self.cfg.seconds is None:
            return self
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.rank == 0:
            self.before = _take_alarm(self.folder)
        _put_aside(self.folder, self.rank)
        self._stacks = open(self.folder / f"stacks-rank-{self.rank}.txt", "w")
        # Python code need not run for this one: it also serves a rank that is stuck in C++.
        faulthandler.register(signal.SIGUSR2, file=self._stacks, all_threads=True)
        self._main = threading.get_ident()
        self.write()  # the thread may not get to run, which is what there is to find out
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._thread is None:
            return
        self._over.set()
        self._thread.join()
        faulthandler.unregister(signal.SIGUSR2)
        assert self._stacks is not None
        self._stacks.close()
        # Nothing is left of an undisturbed run.
        (self.folder / f"rank-{self.rank}.json").unlink(missing_ok=True)
        if not self._has_stack(self.rank):
            (self.folder / f"stacks-rank-{self.rank}.txt").unlink(missing_ok=True)
        with suppress(OSError):
            self.folder.rmdir()

    def _watch(self) -> None:
        while True:
            beat = self.write()
            if beat.seconds > self.allowance(beat.phase):
                self._alarm(beat)
                return
            if self._over.wait(self.period):
                return

    def write(self) -> Heartbeat:
        """Write this rank's heartbeat and return it."""
        step, phase, since = self._at
        seconds = self._clock() - since
        where, waiting = "", False
        if seconds > 0.4 * self.allowance(phase):
            where, waiting = _position(sys._current_frames().get(self._main))
        self._beat += 1
        host, pid = socket.gethostname(), os.getpid()
        beat = Heartbeat(
            self.rank, host, pid, self._beat, step, phase, round(seconds, 3), where, waiting
        )
        _write_whole(self.folder / f"rank-{self.rank}.json", json.dumps(asdict(beat)))
        return beat

    def _alarm(self, own: Heartbeat) -> None:
        """Stacks; the first rank to get here says who holds the run up; leave."""
        assert self._stacks is not None
        faulthandler.dump_traceback(self._stacks, all_threads=True)
        self._stacks.flush()
        first = _claim(self.folder)
        asked = range(self.size) if first else self._node
        beats, silent = self._survey(asked)
        for rank in silent:
            beat = beats.get(rank)
            if beat is not None and beat.host == own.host:
                _poke(beat.pid)
        if first:
            sentence = verdict(beats, silent, self.size, self.folder)
            print(f"llmtrain: rank {self.rank}: watchdog: {sentence}", file=sys.stderr, flush=True)
            _write_whole(
                self.folder / "alarm.json", json.dumps({"step": own.step, "text": sentence})
            )
        else:
            # A launcher ends everybody when one process has ended.
            self._wait_for(self.folder / "alarm.json")
        tell_launcher(EXIT_HANG)
        self._leave(EXIT_HANG)

    def _survey(self, ranks: Sequence[int]) -> tuple[dict[int, Heartbeat], list[int]]:
        """Heartbeats of ``ranks``, and the ranks that have none or whose counter stands still."""
        earlier = {rank: _read_beat(self.folder, rank) for rank in ranks}
        for _ in range(3):
            self._over.wait(max(self.period, _SHORTEST_SIGN / 3))
            self.write()
        found = {rank: _read_beat(self.folder, rank) for rank in ranks}
        # Those that have come to their own alarm write no more, but have left their stack.
        done = {rank for rank in ranks if self._has_stack(rank)}
        silent = []
        for rank in ranks:
            now, then = found[rank], earlier[rank]
            if rank == self.rank or rank in done:
                continue
            if now is None or (then is not None and now.beat == then.beat):
                silent.append(rank)
        return {rank: beat for rank, beat in found.items() if beat is not None}, silent

    def _has_stack(self, rank: int) -> bool:
        try:
            return (self.folder / f"stacks-rank-{rank}.txt").stat().st_size > 0
        except OSError:
            return False

    def _wait_for(self, file: Path) -> None:
        for _ in range(12):
            if file.exists():
                return
            self._over.wait(max(self.period, _SHORTEST_SIGN / 3))


def verdict(beats: Mapping[int, Heartbeat], silent: Sequence[int], size: int, folder: Path) -> str:
    """The sentence that names the ranks which hold the run up."""
    ends = f"stacks of all threads are in {folder}; the run ends with exit code {EXIT_HANG}"
    if silent:
        last = beats.get(silent[0])
        at = "" if last is None else f", last seen after step {last.step} in {last.phase}"
        return f"{_named(silent)} of {size} gave no sign of life{at}; {ends}"
    busy = [beat for beat in beats.values() if not beat.waiting]
    pool = busy or list(beats.values())
    least = min(beat.progress for beat in pool)
    slowest = [beat for beat in pool if beat.progress == least]
    one = max(slowest, key=lambda beat: beat.seconds)
    where = f" at {one.where}" if one.where else ""
    if len(slowest) == size and size > 1:
        return (
            f"all {size} ranks have stood in {one.phase} after step {one.step} for "
            f"{one.seconds:.0f} s, {_named([one.rank])}{where}; {ends}"
        )
    return (
        f"{_named([beat.rank for beat in slowest])} of {size} stood in {one.phase} after "
        f"step {one.step} for {one.seconds:.0f} s{where}; {ends}"
    )


def _named(ranks: Sequence[int]) -> str:
    shown = ", ".join(str(rank) for rank in sorted(ranks)[:8])
    more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
    return ("rank " if len(ranks) == 1 else "ranks ") + shown + more


def _position(frame: FrameType | None) -> tuple[str, bool]:
    """The line that the main thread executes, its own before torch's, and whether it waits."""
    waiting, inner = False, ""
    while frame is not None:
        file = frame.f_code.co_filename
        text = f"{Path(file).name}:{frame.f_lineno} ({frame.f_code.co_name})"
        inner = inner or text
        if any(part in file for part in _WAITING):
            waiting = True
        elif f"{os.sep}torch{os.sep}" not in file and not file.endswith(_STOPWATCH):
            return text, waiting
        frame = frame.f_back
    return inner, waiting


def _read_beat(folder: Path, rank: int) -> Heartbeat | None:
    try:
        return Heartbeat(**json.loads((folder / f"rank-{rank}.json").read_text("utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _write_whole(file: Path, text: str) -> None:
    """Replace ``file``; a disk that is full or gone costs the heartbeat, not the run."""
    try:
        beside = file.with_suffix(f".{os.getpid()}.tmp")
        beside.write_text(text, encoding="utf-8")
        beside.replace(file)
    except OSError:
        return


def _claim(folder: Path) -> bool:
    """Whether this process is the first to come to an alarm."""
    try:
        os.close(os.open(folder / "alarm.claim", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return False
    except OSError:
        return True
    return True


def _poke(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGUSR2)
    except OSError:
        return


def _take_alarm(folder: Path) -> str | None:
    """What the watchdog said when it ended the run before; it is put aside."""
    (folder / "alarm.claim").unlink(missing_ok=True)
    file = folder / "alarm.json"
    try:
        text = str(json.loads(file.read_text("utf-8"))["text"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    number = len(list(folder.glob("alarm-*.json"))) + 1
    file.rename(folder / f"alarm-{number}.json")
    return text


def _put_aside(folder: Path, rank: int) -> None:
    """Add this rank's stacks of an earlier alarm to what is kept of them."""
    file = folder / f"stacks-rank-{rank}.txt"
    with suppress(OSError):
        if file.stat().st_size:
            with (folder / f"earlier-stacks-rank-{rank}.txt").open("a") as kept:
                kept.write(file.read_text("utf-8"))
