"""A SLURM cluster of this machine's own: slurmctld and some slurmd on the loopback interface.

    with Cluster(folder, nodes=2) as cluster:
        cluster.run("sinfo")

Debian: apt-get install --no-install-recommends slurmctld slurmd slurm-client. The nodes are n1, n2,
... with eight pretended cores and one pretended GPU (a plain file) each. No munge (auth/none).
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from helpers.tiny import environment

_CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={control}
AuthType=auth/none
CredType=cred/none
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/ctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/ctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1
ReturnToService=0
SlurmdParameters=config_overrides
GresTypes=gpu
JobRequeue=1
KillWait=20
NodeName=n[1-{nodes}] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs=8 \
Sockets=1 CoresPerSocket=8 ThreadsPerCore=1 RealMemory=4000 Gres=gpu:1 State=UNKNOWN
PartitionName=train Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class Cluster:
    """A context manager; every process it starts is ended by its id."""

    def __init__(self, folder: Path, nodes: int) -> None:
        self.folder, self.nodes = folder, nodes
        self.env = environment(SLURM_CONF=str(folder / "slurm.conf"))
        self._daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Cluster:
        for name in ("state", "dev", *(f"spool/n{i + 1}" for i in range(self.nodes))):
            (self.folder / name).mkdir(parents=True)
        (self.folder / "dev" / "gpu0").touch()
        ports = _free_ports(self.nodes + 1)
        host = socket.gethostname().partition(".")[0]
        values = {"host": host, "control": ports[0], "user": os.environ.get("USER", "root")}
        values |= {"folder": self.folder, "nodes": self.nodes, "first": ports[1], "last": ports[-1]}
        conf = self.folder / "slurm.conf"
        conf.write_text(_CONF.format(**values))
        gres = f"NodeName=n[1-{self.nodes}] Name=gpu File={self.folder}/dev/gpu0\n"
        (self.folder / "gres.conf").write_text(gres)
        try:
            self._start("slurmctld", "-f", str(conf), "-i", "-D")
            for i in range(self.nodes):
                self._start("slurmd", "-f", str(conf), "-N", f"n{i + 1}", "-D")
            idle = ["sinfo", "--noheader", "--states=idle", "--format=%D"]
            self.until(lambda: self.run(*idle).strip() == str(self.nodes), 60, "idle nodes")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._daemons:
            subprocess.run(["scancel", "--user", self._user()], env=self.env, check=False)
            quiet = ["squeue", "--noheader", "--states=R,CG"]
            end = time.monotonic() + 40
            while time.monotonic() < end and self.run(*quiet, check=False).strip():
                time.sleep(0.5)
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def run(self, *command: str, check: bool = True) -> str:
        """The output of a command; AssertionError with its stderr when it fails."""
        done = subprocess.run(
            command, env=self.env, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0 or not check, f"{command}: {done.stderr}"
        return done.stdout

    def state(self, job: str) -> str:
        """SLURM's word for the state of a job, such as PENDING."""
        words = self.run("scontrol", "show", "job", "-o", job).split()
        return dict(w.partition("=")[::2] for w in words)["JobState"]

    def until(self, true: Callable[[], bool], seconds: float, what: str) -> None:
        """Wait for something; AssertionError with the controller's last words when it is late."""
        end = time.monotonic() + seconds
        while not true():
            if time.monotonic() > end:
                log = self.folder / "ctld.log"
                said = (
                    self.run("squeue", check=False) + log.read_text()[-2000:]
                    if log.exists()
                    else ""
                )
                raise AssertionError(f"no {what} after {seconds} s\n{said}")
            time.sleep(0.5)

    def _start(self, program: str, *arguments: str) -> None:
        path = shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
        assert path is not None, f"{program} is missing; apt-get install slurmctld slurmd"
        out = (self.folder / f"daemon-{len(self._daemons)}.out").open("wb")
        self._daemons.append(
            subprocess.Popen([path, *arguments], stdout=out, stderr=out, env=self.env)
        )

    @staticmethod
    def _user() -> str:
        return os.environ.get("USER", "root")


def _free_ports(count: int) -> list[int]:
    """Ports in a row that nothing listens on: slurmd's must follow each other."""
    for base in range(17000, 30000, 50):
        held = []
        try:
            for port in range(base, base + count):
                sock = socket.socket()
                held.append(sock)
                sock.bind(("127.0.0.1", port))
            return list(range(base, base + count))
        except OSError:
            continue
        finally:
            for sock in held:
                sock.close()
    raise AssertionError("no free ports")
