"""Real runs in forked processes that are killed: no imports to wait for, so a run takes a second.

``Run`` forks ranks that train; the caller kills them when it likes. What they print goes to a
file. The parent must not have used torch's threads (see ``helpers.ranks``).
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open

from llmtrain.cli.main import main


class Run:
    """``llmtrain train CONFIG overrides`` on ``ranks`` forked processes."""

    def __init__(
        self,
        config: Path,
        overrides: Sequence[str] = (),
        ranks: int = 1,
        prepare: Callable[[int], None] = lambda rank: None,
    ) -> None:
        self.output = config.parent / "output.txt"
        self.output.write_text("")
        self.store = config.parent / f"store-{time.monotonic_ns()}"
        self.pids = []
        sys.stdout.flush()
        sys.stderr.flush()
        for rank in range(ranks):
            pid = os.fork()
            if pid == 0:
                self._train(rank, ranks, ["train", str(config), *overrides], prepare)
            self.pids.append(pid)

    def _train(
        self, rank: int, ranks: int, words: list[str], prepare: Callable[[int], None]
    ) -> None:
        code = 70
        try:
            torch.set_num_threads(1)
            out = os.open(self.output, os.O_WRONLY | os.O_APPEND)
            os.dup2(out, 1)
            os.dup2(out, 2)
            # pytest's own are not those of file descriptors 1 and 2.
            sys.stdout, sys.stderr = (
                os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2)
            )
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
            os.environ["LOCAL_WORLD_SIZE"] = str(ranks)
            if ranks > 1:
                where = f"file://{self.store}"
                dist.init_process_group("gloo", init_method=where, rank=rank, world_size=ranks)
            prepare(rank)
            code = main(words)
        except BaseException:
            traceback.print_exc()
            raise
        else:
            sys.stdout.flush()
        finally:
            sys.stderr.flush()
            os._exit(code)

    def send(self, number: int = signal.SIGKILL) -> None:
        """A signal to every rank that is still there."""
        for pid in self.pids:
            os.kill(pid, number)

    def wait(self) -> list[int]:
        """Exit code of every rank, minus the signal for one that was killed."""
        codes = []
        for pid in self.pids:
            _, status = os.waitpid(pid, 0)
            codes.append(os.waitstatus_to_exitcode(status))
        self.pids = []
        return codes

    def over(self) -> bool:
        """Whether the first rank has ended (it stays to be waited for)."""
        return os.waitid(os.P_PID, self.pids[0], os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def weights(checkpoint: Path) -> dict[str, bytes]:
    """All tensors of a checkpoint, bit for bit."""
    out: dict[str, bytes] = {}
    for file in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(str(file), "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118
                out[key] = tensors.get_tensor(key).numpy().tobytes()
    return out
