"""The job that ships, under a SLURM that is real: two slurmd and more on this machine."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.slurm import Cluster
from helpers.tiny import command, llmtrain, make_corpus, records, tiny_config

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]
STEPS = 20
# A disk that is full on one node, for the health check of that node alone.
FULL_DISK = """\
import os, shutil
if os.environ.get("SLURMD_NODENAME") == "n1":
    usage = shutil.disk_usage("/")
    shutil.disk_usage = lambda path: usage._replace(free=1 << 20)
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("slurm"), nodes=3) as made:
        yield made


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """The undisturbed run, by torchrun on two processes."""
    folder = tmp_path_factory.mktemp("straight")
    done = llmtrain("train", str(tiny_config(folder, corpus)), ranks=2)
    assert done.returncode == 0, done.stderr
    return folder / "runs" / "tiny"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


def submit(cluster: Cluster, config: Path, *words: str, **env: str) -> str:
    """The id of a job for CPUs, submitted by the command line."""
    line = command("launch", "slurm", str(config), *words, "--gpus-per-node", "0")
    done = subprocess.run(
        line, env={**cluster.env, **env}, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    found = re.match(r"submitted job (\d+): ", done.stdout)
    assert found, done.stdout
    return found[1]


def log(run: Path, job: str) -> str:
    """The job's own log, and the end of what its ranks said."""
    file = run / "launch" / f"{job}.log"
    return file.read_text() if file.exists() else ""


def gone(cluster: Cluster, job: str) -> bool:
    return cluster.state(job) in {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}


def start_soon(cluster: Cluster, job: str) -> None:
    """Start a requeued job without SLURM's two minutes; in the very second in which it was ended
    the node would take it for the one that was ended."""
    cluster.run("scontrol", "update", f"JobId={job}", "StartTime=now+3")


def losses(run: Path) -> list[tuple[int, float, float]]:
    return [(r["step"], r["loss"], r["grad_norm"]) for r in records(run)]


def test_past_the_time_limit_on_two_nodes_as_if_undisturbed(
    cluster: Cluster, corpus: Path, straight: Path, tmp_path: Path
) -> None:
    config = tiny_config(tmp_path, corpus, hooks=[{"use": "helpers.hooks:Slow"}])
    run = tmp_path / "runs" / "tiny"
    limit = ["--nodes", "2", "--time", "2", "--warning", "30"]
    job = submit(cluster, config, *limit, SLOW_SECONDS="8")
    # SLURM lets a requeued job wait for two minutes; the test does not.
    cluster.until(lambda: "goes on from step" in log(run, job), 180, "requeue")
    cluster.until(lambda: cluster.state(job) == "PENDING", 60, "pending job")
    first = max(step for step, _, _ in losses(run))
    assert 0 < first < STEPS
    assert (run / "checkpoints" / f"step-{first:08d}").is_dir()
    start_soon(cluster, job)
    cluster.until(lambda: gone(cluster, job), 180, "end of the job")
    said = log(run, job)
    assert cluster.state(job) == "COMPLETED", said
    assert "the time limit is near" in said
    assert re.search(r"all-reduce of 8 MiB over 2 ranks: \d", said)
    assert "2 nodes (n[1-2]), 1 processes each, restart 1, newest step" in said
    assert f"done at step {STEPS}" in said
    assert losses(run) == losses(straight)
    shown = cluster.run(*command("launch", "status", str(run)))
    assert re.search(rf"{job} +COMPLETED", shown) and f"step {STEPS}" in shown


def test_a_node_is_lost_in_the_middle(
    cluster: Cluster, corpus: Path, straight: Path, tmp_path: Path
) -> None:
    """SLURM ends and requeues the job; it goes on where nodes are left."""
    config = tiny_config(tmp_path, corpus, hooks=[{"use": "helpers.hooks:Slow"}])
    run = tmp_path / "runs" / "tiny"
    job = submit(cluster, config, "--nodes", "2", "--no-health-check", SLOW_SECONDS="2")
    cluster.until((run / "checkpoints" / "step-00000005").is_dir, 120, "checkpoint")
    cluster.run("scontrol", "update", "NodeName=n1", "State=DOWN", "Reason=test")
    try:
        cluster.until(lambda: cluster.state(job) == "PENDING", 60, "pending job")
        start_soon(cluster, job)
        cluster.until(lambda: gone(cluster, job), 180, "end of the job")
    finally:
        cluster.run("scontrol", "update", "NodeName=n1", "State=RESUME")
    assert cluster.state(job) == "COMPLETED", log(run, job)
    assert "2 nodes (n[2-3]), 1 processes each, restart 1" in log(run, job)
    assert losses(run) == losses(straight)


def test_scancel_saves_and_does_not_come_back(
    cluster: Cluster, corpus: Path, tmp_path: Path
) -> None:
    config = tiny_config(tmp_path, corpus, hooks=[{"use": "helpers.hooks:Slow"}])
    run = tmp_path / "runs" / "tiny"
    job = submit(cluster, config, "--no-health-check", SLOW_SECONDS="3")
    cluster.until((run / "metrics.jsonl").exists, 120, "first step")
    cluster.until(lambda: len(records(run)) > 0, 60, "first step")
    cluster.run("scancel", job)
    cluster.until(lambda: gone(cluster, job), 60, "end of the job")
    assert cluster.state(job) == "CANCELLED"
    last = records(run)[-1]["step"]
    assert last < STEPS
    cluster.until((run / "checkpoints" / f"step-{last:08d}").is_dir, 20, "checkpoint")
    cluster.until(lambda: "cancelled" in log(run, job), 20, "last words")
    assert (run / "launch" / "jobs").read_text().split() == [job]
    assert not cluster.run("squeue", "--noheader", "--states=PD,R").strip()


def test_a_node_that_fails_its_health_check_is_left_out(
    cluster: Cluster, corpus: Path, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(FULL_DISK)
    path = f"{tmp_path}:{cluster.env['PYTHONPATH']}"
    config = tiny_config(tmp_path, corpus)
    run = tmp_path / "runs" / "tiny"
    job = submit(cluster, config, "--nodes", "2", PYTHONPATH=path)
    after = ["--parsable", f"--dependency=afterok:{job}", f"--output={tmp_path}/after.out"]
    last = cluster.run("sbatch", *after, "--wrap", f"test -d {run}/checkpoints").strip()
    jobs = run / "launch" / "jobs"
    cluster.until(lambda: len(jobs.read_text().split()) == 2, 120, "second job")
    _, second = jobs.read_text().split()
    cluster.until(lambda: gone(cluster, second), 180, "end of the second job")
    said = log(run, job)
    assert "n1: NOT FIT: disk: 0.0 GiB free" in said
    assert "fails the health check: n1\n" in said
    assert cluster.state(second) == "COMPLETED", log(run, second)
    assert "2 nodes (n[2-3])" in log(run, second)
    assert f"job {last} waits for job {second} in its place" in said
    cluster.until(lambda: cluster.state(last) == "COMPLETED", 60, "end of the job that waited")
    assert records(run)[-1]["step"] == STEPS
