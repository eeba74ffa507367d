"""``llmtrain`` in processes that need not load torch: forked from one that has.

A process of the command spends two to four seconds of its processor on imports, and each rank of
a launcher the same; the runs of the tests train for half a second. So a server, a fresh Python
process that has imported what training imports and has done nothing else, forks the command, once
for every rank. What runs is the command's real entry point, under a launcher's variables and its
key-value store, and it ends as a process does: exit code, signals, atexit, finalisation.

What differs from a process of its own: nothing is imported anew, ranks share one hash seed, and
the process does not execute itself again. Tests that are about these start real ones
(``helpers.tiny.llmtrain`` with ``fresh=True``).
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import gc
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# As a launcher does: this long may others take to end after one has failed, or been asked to.
GRACE_SECONDS = 10.0
MODULES = (
    *("llmtrain.cli.train", "llmtrain.cli.branch", "llmtrain.cli.continual"),
    *("llmtrain.cli.checkpoint", "llmtrain.train.run"),
)


class Running:
    """A command that has been started; ``pids`` of its ranks."""

    def __init__(
        self, job: dict[str, Any], timeout: float, deepspeed: bool, store: Any = None
    ) -> None:
        self._store = store  # that its ranks meet in
        self._folder = tempfile.TemporaryDirectory(prefix="warm-")
        self._said = [Path(self._folder.name, name) for name in ("out", "err")]
        for file in self._said:
            file.touch()
        self._words, self._timeout = job["words"], timeout
        self._server = _server(deepspeed)
        said = [str(file) for file in self._said]
        self._server.tell(job | {"folder": os.getcwd(), "said": said, "timeout": timeout})
        self.pids: list[int] = self._server.answer()

    def runs(self) -> bool:
        """Whether it has not ended yet."""
        return not self._server.has_answered()

    def said(self) -> str:
        """What it has printed so far, and then its errors."""
        return "".join(file.read_text(errors="replace") for file in self._said)

    def send(self, number: int = signal.SIGKILL) -> None:
        """A signal to every rank that is still there."""
        for pid in self.pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def wait(self) -> subprocess.CompletedProcess[str]:
        """Its end, with what it said."""
        code: int | None = self._server.answer()
        out, err = (file.read_text() for file in self._said)
        self._folder.cleanup()
        if code is None:
            raise subprocess.TimeoutExpired(self._words, self._timeout, out, err)
        return subprocess.CompletedProcess(self._words, code, out, err)


def start(
    arguments: tuple[str, ...],
    ranks: int,
    environment: dict[str, str],
    timeout: float,
    before: str = "",
) -> Running:
    """``llmtrain *arguments`` on ``ranks`` processes. One command at a time.

    With several ranks the exit code is torchrun's: 0, or 1 once one of them has failed. before:
    Python that each process runs first, to have something happen to the command.
    """
    from torch.distributed import TCPStore

    job = {
        "words": ["llmtrain", *arguments], "ranks": ranks, "environment": environment,
        "before": before,
    }  # fmt: skip
    store = None
    if ranks > 1:
        # Kept by the launcher, as torchrun's is: it outlives a rank that fails.
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        job["environment"] = {
            **environment, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port),
            "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "GROUP_RANK": "0",
            "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": "warm",
            "TORCHELASTIC_RESTART_COUNT": "0", "TORCHELASTIC_MAX_RESTARTS": "0",
        }  # fmt: skip
    return Running(job, timeout, "parallel.engine=deepspeed" in arguments, store)


def python(code: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """``python -c code *arguments`` with some variables of its environment; output is kept."""
    from helpers.tiny import environment

    words = ["-c", *arguments]
    job = {"words": words, "ranks": 1, "environment": environment(**variables), "code": code}
    return Running(job, 120.0, deepspeed=False).wait()


class _Server:
    """The process that forks, seen from the tests; it ends with this one.

    DeepSpeed changes torch where it is imported: runs on it have a server of their own.
    """

    def __init__(self, deepspeed: bool) -> None:
        from helpers.tiny import environment

        from llmtrain.cli.process import wanted_environment

        env = environment()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "helpers.warm", *(["deepspeed"] if deepspeed else [])],
            env=env | wanted_environment(env), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            bufsize=0,
        )  # fmt: skip
        atexit.register(self._process.kill)

    def tell(self, job: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(job).encode() + b"\n")

    def answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"the server has ended with {self._process.wait()}"
        return json.loads(line)

    def has_answered(self) -> bool:
        return bool(select.select([self._process.stdout], [], [], 0.0)[0])


_server = functools.cache(_Server)


def serve() -> dict[str, Any]:
    """The server: forks each job that comes on stdin. Returns only in a child, with its job."""
    jobs, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(nothing, 1)
    for line in jobs:
        job = json.loads(line)
        children: list[int] = []
        for rank in range(job["ranks"]):
            child = os.fork()
            if not child:
                jobs.close()
                answers.close()
                become(rank, job)
                return dict(job)
            children.append(child)
        print(json.dumps(children), file=answers, flush=True)
        print(json.dumps(ended(set(children), job["timeout"])), file=answers, flush=True)
    os._exit(0)


def ended(children: set[int], timeout: float) -> int | None:
    """Exit code of ``children`` together, None after ``timeout`` seconds.

    The first that fails has the others terminated, and in the end killed.
    """
    several = len(children) > 1
    code, late = 0, False
    deadline = time.monotonic() + timeout
    while children:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child:
            children.remove(child)
            own = os.waitstatus_to_exitcode(status)
            if own and not code:
                code = 1 if several else own
                deadline = time.monotonic() + GRACE_SECONDS
                _signal(children, signal.SIGTERM)
        elif time.monotonic() > deadline:
            late = not code
            code = code or 1
            deadline = time.monotonic() + GRACE_SECONDS
            _signal(children, signal.SIGKILL)
        else:
            time.sleep(0.002)
    return None if late else code


def _signal(children: set[int], number: signal.Signals) -> None:
    for child in children:
        os.kill(child, number)


def become(rank: int, job: dict[str, Any]) -> None:
    """Make this process rank ``rank`` of the job, with nothing of the server left to it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # it ends with the server
    for number, file in enumerate(job["said"], start=1):
        out = os.open(file, os.O_WRONLY | os.O_APPEND)
        os.dup2(out, number)
        os.close(out)
    os.environ.clear()
    os.environ.update(job["environment"])
    if job["ranks"] > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    from llmtrain.cli.process import MARK, wanted_environment

    os.environ.update(wanted_environment(os.environ), **{MARK: str(os.getpid())})
    os.chdir(job["folder"])
    sys.argv[:] = job["words"]


if __name__ == "__main__":
    for name in MODULES:
        importlib.import_module(name)
    if "deepspeed" in sys.argv:
        import torch

        from llmtrain.parallel.zero import import_deepspeed

        os.environ["DS_ACCELERATOR"] = "cpu"
        import_deepspeed(torch.device("cpu"))
    # What is imported is no garbage: children need not look through it, nor take it down.
    gc.collect()
    gc.freeze()
    job = serve()
    exec(job.get("before", ""), {})
    if "code" in job:
        exec(compile(job["code"], "<code>", "exec"), {"__name__": "__main__"})
    else:
        # Ends as the installed command does.
        from llmtrain.cli.main import entry

        entry()
