"""Two hosts on this machine: network namespaces with addresses of their own and a link between.

Needs root and ``ip`` (Debian: iproute2). Files are shared, as on a cluster's file system.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType

from helpers.tiny import environment


def possible() -> bool:
    """Whether this machine allows it."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    name = f"probe{os.getpid() % 100000}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False)
    subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
    return made.returncode == 0


class Hosts:
    """Host 0 and host 1; a context manager that takes them away again."""

    def __init__(self, folder: Path) -> None:
        mark = f"{os.getpid() % 10000}"
        self.names = [f"lt{mark}a", f"lt{mark}b"]
        self.addresses = ["10.77.0.1", "10.77.0.2"]
        self.folder = folder
        self.agents: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Hosts:
        self._ip("link", "add", f"{self.names[0]}0", "type", "veth", "peer", f"{self.names[1]}0")
        for name, address in zip(self.names, self.addresses, strict=True):
            self._ip("netns", "add", name)
            self._ip("link", "set", f"{name}0", "netns", name)
            self._ip("-n", name, "addr", "add", f"{address}/24", "dev", f"{name}0")
            self._ip("-n", name, "link", "set", f"{name}0", "up")
            self._ip("-n", name, "link", "set", "lo", "up")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for host, agent in enumerate(self.agents):
            self.kill(host)
            agent.wait()
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], check=False)

    def _ip(self, *words: str) -> None:
        subprocess.run(["ip", *words], check=True)

    def link(self, up: bool) -> None:
        """Plug the cable in or out."""
        self._ip("-n", self.names[0], "link", "set", f"{self.names[0]}0", "up" if up else "down")

    def torchrun(self, *words: str, nodes: str = "1:2", restarts: int = 3) -> None:
        """``torchrun -m llmtrain WORDS`` on both hosts, one process each."""
        for host, (name, address) in enumerate(zip(self.names, self.addresses, strict=True)):
            command = [
                *("ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run"),
                *(f"--nnodes={nodes}", "--nproc-per-node=1", f"--max-restarts={restarts}"),
                *("--rdzv-backend=c10d", f"--rdzv-endpoint={self.addresses[0]}:29555"),
                *("--rdzv-id=two", f"--rdzv-conf=is_host={1 - host},last_call_timeout=3"),
                *(f"--local-addr={address}", "--monitor-interval=0.2", "-m", "llmtrain", *words),
            ]
            with (self.folder / f"host-{host}.txt").open("ab") as out:
                own = environment(GLOO_SOCKET_IFNAME=f"{name}0", SLOW_SECONDS="0.1")
                self.agents.append(
                    subprocess.Popen(
                        command, env=own, stdout=out, stderr=out, start_new_session=True
                    )
                )

    def said(self, host: int) -> str:
        """All that a host has printed."""
        return (self.folder / f"host-{host}.txt").read_text(errors="replace")

    def kill(self, host: int) -> None:
        """All processes of a host, at once."""
        found = subprocess.run(
            ["ip", "netns", "pids", self.names[host]], capture_output=True, text=True, check=True
        )
        for pid in found.stdout.split():
            try:
                os.kill(int(pid), signal.SIGKILL)
            except ProcessLookupError:
                continue
