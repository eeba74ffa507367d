"""Writing, submitting and showing the SLURM job of a run."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llmtrain.checkpoint.layout import parse_step
from llmtrain.config import RunConfig, check_world, to_yaml
from llmtrain.errors import ConfigError, EnvironmentFault, secrets_in

TEMPLATE = Path(__file__).with_name("train.sbatch")
FOLDER, JOB, JOBS = "launch", "job.sbatch", "jobs"
# So long before the time limit SLURM signals the job: one step and one checkpoint.
WARNING_SECONDS = 300
_BEGIN, _END = "# -- filled in\n", "# -- end\n"
# Options of sbatch that the job counts on: what sets them instead.
_OWN = {
    "nodes": "--nodes",
    "ntasks": "--processes-per-node",
    "ntasks-per-node": "--processes-per-node",
    "time": "--time",
    "signal": "--warning",
    "partition": "--partition",
    "exclude": "--exclude",
    "array": "one job for each run",
}
_TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")


@dataclass(frozen=True)
class SlurmJob:
    """What a job asks SLURM for.

    gpus_per_node: 0 trains on CPUs. processes_per_node: one per GPU where None. time: as sbatch
    reads it (minutes, H:M:S, D-H, D-H:M:S); the job goes on past it. container: image for
    ``runtime``, None trains in the environment of this Python. exclude: nodes never to use.
    options: further sbatch options, without dashes. warning: seconds between the signal and the
    limit.
    """

    nodes: int
    gpus_per_node: int
    time: str
    processes_per_node: int | None = None
    partition: str | None = None
    container: str | None = None
    runtime: str = "pyxis"
    mounts: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    warning: int = WARNING_SECONDS
    health: bool = True

    @property
    def processes(self) -> int:
        """Training processes on a node."""
        if self.processes_per_node is not None:
            return self.processes_per_node
        return max(1, self.gpus_per_node)


def check_job(cfg: RunConfig, job: SlurmJob) -> None:
    """Raise ConfigError where the job could not run."""
    for key, least in (("nodes", 1), ("gpus_per_node", 0), ("processes", 1), ("warning", 1)):
        if getattr(job, key) < least:
            name = key.replace("_", "-") + ("-per-node" if key == "processes" else "")
            raise ConfigError(f"--{name} {getattr(job, key)}: must be {least} or more")
    if job.gpus_per_node and job.processes > job.gpus_per_node:
        raise ConfigError(
            f"--processes-per-node {job.processes}: a node has {job.gpus_per_node} GPUs; start at "
            "most one process per GPU"
        )
    if cfg.device == "cuda" and not job.gpus_per_node:
        raise ConfigError("device: cuda needs --gpus-per-node 1 or more")
    seconds = time_limit(job.time)
    if seconds <= job.warning:
        raise ConfigError(
            f"--time {job.time}: the run is told to save {job.warning} s before the limit, which "
            f"leaves no time to train; ask for more than {job.warning // 60} minutes"
        )
    for option in job.options:
        if not re.fullmatch(r"[a-z][a-z-]*(=[^\n]*)?", option):
            raise ConfigError(
                f"--sbatch {option!r}: write an option of sbatch without dashes, such as "
                "account=physics"
            )
        key = option.partition("=")[0]
        if key in _OWN:
            raise ConfigError(f"--sbatch {key}: use {_OWN[key]}, which the job counts on")
    check_world(cfg, job.nodes * job.processes)


def time_limit(text: str) -> int:
    """Seconds of a SLURM time: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S. Raises ConfigError."""
    match = _TIME.fullmatch(text)
    if match is None:
        raise ConfigError(f"--time {text!r}: write 24:00:00, 2-12 (days-hours) or minutes")
    days, *rest = match.groups()
    parts = [int(part) for part in rest if part is not None]
    if days is not None:
        hours, minutes, seconds = [*parts, 0, 0][:3]
    elif len(parts) == 3:
        hours, minutes, seconds = parts
    else:
        hours, minutes, seconds = 0, *[*parts, 0][:2]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def prepare_job(cfg: RunConfig, job: SlurmJob) -> Path:
    """Write the job and the run's resolved config to ``RUN/launch``; returns the job's file.

    Nothing is submitted. Files of an earlier submission that only the job itself reads (its count
    of failures, the nodes it excluded) begin anew. Raises ConfigError, also where a job of this run
    is still in the queue, and OSError.
    """
    check_job(cfg, job)
    folder = (Path(cfg.out) / cfg.name / FOLDER).resolve()
    text = script(*_filled(cfg, job, folder))
    if secret := next(secrets_in(text), None):
        raise ConfigError(
            f"the job would hold the secret of ${secret[0]}; leave it out: a job inherits the "
            "environment of who submits it"
        )
    _refuse_while_queued(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(to_yaml(cfg), encoding="utf-8")
    (folder / "progress").unlink(missing_ok=True)
    (folder / "excluded").write_text("".join(f"{n}\n" for n in job.exclude), encoding="utf-8")
    file = folder / JOB
    file.write_text(text, encoding="utf-8")
    return file


def _refuse_while_queued(folder: Path) -> None:
    """A job that runs or waits reads these files again whenever it begins anew."""
    if not (folder / JOBS).is_file() or shutil.which("squeue") is None:
        return
    mine = _ask(["squeue", "--me", "--noheader", "--format=%i|%T|"], must=True)
    for number in _jobs(folder):
        if number in mine:
            raise ConfigError(
                f"job {number} of this run is {mine[number][0]}; wait for it or end it "
                f"(scancel {number}), or give the new run another name"
            )


def _jobs(folder: Path) -> list[str]:
    """Ids of the jobs that were submitted for a run, oldest first."""
    return list(dict.fromkeys((folder / JOBS).read_text(encoding="utf-8").split()))


def script(options: Sequence[str], settings: Mapping[str, str]) -> str:
    """The template with its lines between the marks filled in.

    options: of sbatch, as ``key=value`` or ``key``. settings: the variables of the template by
    name, as bash reads them; those left out are as they stand there.
    """
    head, _, rest = TEMPLATE.read_text(encoding="utf-8").partition(_BEGIN)
    own, _, body = rest.partition(_END)
    plain = [line.partition("=") for line in own.splitlines() if not line.startswith("#")]
    values = {key: value for key, _, value in plain}
    if unknown := settings.keys() - values.keys():
        raise ValueError(f"the template has no {sorted(unknown)}")
    lines = [*map(_option, options), *(f"{k}={v}" for k, v in (values | dict(settings)).items())]
    return head + "".join(f"{line}\n" for line in lines) + body


def _filled(cfg: RunConfig, job: SlurmJob, folder: Path) -> tuple[list[str], dict[str, str]]:
    run, work = folder.parent, Path.cwd()
    lines = [
        f"job-name={cfg.name}",
        f"nodes={job.nodes}",
        f"ntasks-per-node={job.processes}",
        *([f"gpus-per-node={job.gpus_per_node}"] if job.gpus_per_node else []),
        f"time={job.time}",
        f"signal=B:USR1@{job.warning}",
        "requeue",
        "open-mode=append",
        f"output={folder}/%j.log",
        *([f"partition={job.partition}"] if job.partition else []),
        *([f"exclude={','.join(job.exclude)}"] if job.exclude else []),
        *job.options,
    ]
    # In a container llmtrain is what the image has; else the Python that submits.
    command = ["llmtrain"] if job.container else [sys.executable, "-m", "llmtrain"]
    mounts = dict.fromkeys([f"{work}:{work}", f"{run}:{run}", *job.mounts])
    settings = {
        "run": shlex.quote(str(run)),
        "work": shlex.quote(str(work)),
        "job": shlex.quote(str(folder / JOB)),
        "command": f"({shlex.join(command)})",
        "words": f"({shlex.join(['train', str(folder / 'config.yaml')])})",
        "processes": str(job.processes),
        "gpus": str(job.gpus_per_node),
        "container": shlex.quote(job.container or ""),
        "runtime": job.runtime,
        "mounts": shlex.quote(",".join(mounts)),
        "health": str(int(job.health)),
    }
    return lines, settings


def _option(text: str) -> str:
    """``key=value`` for sbatch; without quotes a space would end the value."""
    key, _, value = text.partition("=")
    return f"#SBATCH --{key}" + (f"={shlex.quote(value)}" if value else "")


def submit(file: Path) -> str:
    """Hand a prepared job to sbatch; returns its id. Raises EnvironmentFault when refused."""
    _need("sbatch", f"; the job is {file}")
    done = subprocess.run(
        ["sbatch", "--parsable", str(file)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        reason = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise EnvironmentFault(f"sbatch refused {file}: {reason}")
    job = done.stdout.strip().partition(";")[0]
    with (file.parent / JOBS).open("a", encoding="utf-8") as jobs:
        jobs.write(f"{job}\n")
    return job


@dataclass(frozen=True)
class JobState:
    """One job of a run. state: SLURM's word; "ended" where SLURM no longer knows the job."""

    job: str
    state: str
    detail: str


def status(run: Path) -> tuple[list[JobState], int | None]:
    """The jobs submitted for a run, oldest first, and the step of its newest checkpoint.

    Raises ConfigError where none was submitted, EnvironmentFault where squeue is not there or
    gives no answer.
    """
    file = run / FOLDER / JOBS
    if not file.is_file():
        raise ConfigError(f"{run}: no job was submitted for it; see llmtrain launch slurm --help")
    _need("squeue", "")
    ids = _jobs(file.parent)
    known = _ask(
        ["squeue", "--me", "--noheader", "--states=all", "--format=%i|%T|%M of %l on %D nodes, %R"],
        must=True,
    )
    if shutil.which("sacct"):
        form = "--format=JobID,State,Elapsed"
        for job, state in _ask(
            ["sacct", "--noheader", "-X", "-P", form, f"--jobs={','.join(ids)}"]
        ).items():
            known.setdefault(job, state)
    states = [JobState(job, *known.get(job, ("ended", ""))) for job in ids]
    steps = [parse_step(path.name) for path in (run / "checkpoints").glob("step-*")]
    return states, max((step for step in steps if step is not None), default=None)


def _ask(command: list[str], must: bool = False) -> dict[str, tuple[str, str]]:
    """Job id to (state, detail), from lines ``id|state|detail``.

    When refused: empty, or EnvironmentFault where there ``must`` be an answer.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if must and done.returncode != 0:
        reason = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise EnvironmentFault(f"{command[0]} gives no answer: {reason}; ask again later")
    rows = [line.split("|", 2) for line in done.stdout.splitlines() if line.count("|") >= 2]
    return {job.strip(): (state.strip(), detail.strip()) for job, state, detail in rows}


def _need(program: str, more: str) -> None:
    if shutil.which(program) is None:
        raise EnvironmentFault(
            f"{program} is not on the PATH ({os.uname().nodename} is no login node of a SLURM "
            f"cluster); run this where it is, or use --dry-run{more}"
        )
