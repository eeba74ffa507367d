"""Runs that things happen to, again and again, until they are let finish.

``Trajectory`` is one training of a tiny model. Each ``strike`` starts it, or goes on with it, under
a fault drawn from a seeded generator and checks what must hold afterwards: every checkpoint that
is published is whole, and none that was good before is lost. ``finish`` lets it come to its end.
"""

from __future__ import annotations

import errno
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from helpers import warm
from helpers.stored import bits
from helpers.tiny import environment, tiny_config

from llmtrain.checkpoint import scan, verify

STEPS, INTERVAL = 40, 2
# What changes files, by name in ``os``; shutil and pathlib go through these.
CALLS = ("write", "fsync", "mkdir", "rename", "replace", "unlink", "rmdir", "ftruncate", "pwrite")
KINDS = (
    *("kill", "kill", "kill at call", "kill at call", "kill at call", "kill on a slow disk"),
    *("terminate", "storm", "full", "read-only", "broken disk", "truncate", "flip", "delete"),
)


def at_call(number: int, action: Callable[[Any], None], again: bool = False) -> None:
    """Let ``action`` happen right before the n-th call that changes files, and perhaps all later.

    Only calls from here on count, of all threads. action: gets the call's first argument.
    """
    left = [number]

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] == 0 or (again and left[0] < 0):
                action(args[0] if args else None)
            return real(*args, **kwargs)

        return call

    for name in CALLS:
        setattr(os, name, counted(getattr(os, name)))


def die(_: Any) -> None:
    """As by kill -9."""
    os.kill(os.getpid(), signal.SIGKILL)


def pause(_: Any) -> None:
    """As on a slow disk."""
    time.sleep(0.02)


def fail(code: int) -> Callable[[Any], None]:
    """What the system says about a disk: with the path, where the call has one."""

    def raise_it(target: Any) -> None:
        path = (target,) if isinstance(target, str | os.PathLike) else ()
        raise OSError(code, os.strerror(code), *path)

    return raise_it


class Trajectory:
    """One run in ``folder`` on ``corpus``; draw: decides what happens when."""

    def __init__(self, folder: Path, corpus: Path, draw: random.Random) -> None:
        changes: dict[str, Any] = {
            "train__duration": f"{STEPS}step",
            "train__micro_batch_size": 4,
            "model": {"d_model": 16, "n_layers": 1, "n_heads": 2, "d_ff": 32},
            "data__seq_len": 24,
            "eval__every": None,
            "eval__samples": 2,
            "checkpoint__every": f"{INTERVAL}step",
        }
        self.config = tiny_config(folder, corpus, **changes)
        self.run, self.draw = folder / "runs" / "tiny", draw
        self.runs, self.log = 0, [""]
        self.good = -1

    @property
    def checkpoints(self) -> Path:
        """Where they are."""
        return self.run / "checkpoints"

    def strike(self, kind: str) -> None:
        """One run with a fault of ``kind``, and the checks after it."""
        if kind in ("truncate", "flip", "delete"):
            self._damage(kind)
            kind = "kill at call"
        number = self.draw.randrange(1, 90)
        before = {
            "kill at call": f"at_call({number}, die)",
            "kill on a slow disk": "at_call(1, pause, again=True)",
            "full": f"at_call({number}, fail({errno.ENOSPC}), again=True)",
            "read-only": f"at_call({number}, fail({errno.EROFS}), again=True)",
            "broken disk": f"at_call({number}, fail({errno.EIO}))",
        }
        run = self._start(before.get(kind, ""))
        self._meanwhile(kind, run)
        code, said = self._end(run)
        self.log.append(f"{kind} ({number}): exit code {code}")
        expected = {
            **dict.fromkeys(("kill", "kill at call", "kill on a slow disk"), (-9, 0)),
            **dict.fromkeys(("full", "read-only", "broken disk"), (2, 0)),
            **dict.fromkeys(("terminate", "storm"), (75, 0, -15, -10)),  # or before anybody listens
        }
        assert code in expected[kind], f"{self.story()}\n{said}"
        assert code != 2 or "Traceback" not in said, f"{self.story()}\n{said}"
        self._check()

    def _start(self, before: str = "") -> warm.Running:
        before = f"from faults.campaign import at_call, die, fail, pause\n{before}"
        words = ("train", str(self.config))
        return warm.start(words, 1, environment(), 120.0, before)

    def _end(self, run: warm.Running) -> tuple[int, str]:
        """Exit code, minus the signal for a process that was killed, and what it said."""
        self.runs += 1
        done = run.wait()
        return done.returncode, done.stdout + done.stderr

    def _meanwhile(self, kind: str, run: warm.Running) -> None:
        if kind in ("kill", "kill on a slow disk", "terminate", "storm"):
            end = time.monotonic() + self.draw.uniform(0.05, 1.5)
            while time.monotonic() < end and run.runs():
                time.sleep(0.005)
        if kind in ("kill", "kill on a slow disk"):
            run.send()
        elif kind == "terminate":
            run.send(signal.SIGTERM)
        elif kind == "storm":
            for _ in range(8):
                run.send(self.draw.choice((signal.SIGTERM, signal.SIGUSR1)))
                time.sleep(self.draw.uniform(0, 0.03))

    def _damage(self, kind: str) -> None:
        """Harm a file of the newest checkpoint, as long as there is another one."""
        found = [c for c in scan(self.checkpoints) if c.problem is None]
        if len(found) < 2:
            return
        file = self.draw.choice(sorted(p for p in found[-1].path.iterdir() if p.stat().st_size))
        data = bytearray(file.read_bytes())
        place = self.draw.randrange(len(data))
        if kind == "flip":
            data[place] ^= 1 << self.draw.randrange(8)
        elif kind == "truncate":
            del data[place:]
        file.write_bytes(bytes(data))
        if kind == "delete":
            file.unlink()
        self.good = found[-2].step
        self.log.append(f"{kind} {file.parent.name}/{file.name} at {place}")

    def _check(self) -> None:
        """What is there is whole or known to be damaged, and what was good is there or newer."""
        good = [c.step for c in scan(self.checkpoints) if not verify(c.path)]
        newest = max(good, default=-1)
        assert newest >= self.good, f"had step {self.good}, has {good}\n{self.story()}"
        self.good = newest

    def finish(self) -> dict[str, bytes]:
        """Go on to the end undisturbed; the last weights and moments, bit for bit."""
        start = self.good
        code, said = self._end(self._start())
        assert code == 0, f"{self.story()}\n{said}"
        if 0 <= start < STEPS:
            assert f"after step {start}\n" in said, f"{self.story()}\n{said}"
        rest = {p.name[:5] for p in self.checkpoints.iterdir() if p.name.startswith(".")}
        assert rest == {".lock"}, f"left: {rest}\n{self.story()}"
        return bits(self.checkpoints / f"step-{STEPS:08d}")

    def story(self) -> str:
        """What happened so far."""
        return "\n".join(self.log)
