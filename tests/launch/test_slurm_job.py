"""The job that ``llmtrain launch slurm`` writes: its words, and what it does with stand-ins.

tests/cluster runs it under a real SLURM; here srun, sbatch and scontrol are little scripts, so
that every exit code and every container can be shown in a second.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from llmtrain.cli.main import main
from llmtrain.errors import ConfigError
from llmtrain.launch.slurm import TEMPLATE, time_limit

ROOT = Path(__file__).resolve().parents[2]
CONFIG = str(ROOT / "configs" / "quickstart.yaml")
CPUS = ["--gpus-per-node", "0"]
# srun runs its command once, as the first task; training is what $TRAIN says, after its health.
STANDS_IN = {
    "srun": """
while [[ $1 == --* ]]; do echo "$1" >> "$TOLD"; shift; done
export SLURMD_NODENAME=n4 SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NTASKS=1
exec "$@"
""",
    "scontrol": """
if [[ $1 == show && $2 == hostnames ]]; then echo n4; exit; fi
if [[ $1 == show ]]; then echo "NodeName=n4 NodeAddr=10.0.0.4 x=y"; exit; fi
echo "scontrol $*" >> "$TOLD"
""",
    "sbatch": 'echo "sbatch $*" >> "$TOLD"; echo 43',
    "squeue": 'echo "43|afterany:42(unfulfilled)"; cat "$WAITING" 2>/dev/null',
    "sleep": "",
    "apptainer": """
echo "apptainer $*" | head -n 1 >> "$TOLD"
while [[ $1 != bash ]]; do shift; done
exec "$@"
""",
    "llmtrain": """
if [[ $1 == doctor && -n ${RANK:-} ]]; then exit "${ACROSS:-0}"; fi
if [[ $1 == doctor ]]; then exit "${HEALTH:-0}"; fi
echo "llmtrain $* rank=$RANK/$WORLD_SIZE at=$MASTER_ADDR" >> "$TOLD"
eval "$TRAIN"
""",
}


class Job:
    """A job that was written, with its stand-ins."""

    def __init__(self, folder: Path, *words: str) -> None:
        self.folder, self.run = folder, folder / "runs" / "quickstart"
        line = ["launch", "slurm", CONFIG, f"out={folder}/runs", *CPUS, "--dry-run", *words]
        assert main(line) == 0
        self.file = self.run / "launch" / "job.sbatch"
        text = self.file.read_text()
        command = next(x for x in text.splitlines() if x.startswith("command="))
        self.file.write_text(text.replace(command, "command=(llmtrain)"))
        (folder / "bin").mkdir()
        for name, body in STANDS_IN.items():
            program = folder / "bin" / name
            program.write_text(f"#!/usr/bin/env bash\n{body}\n")
            program.chmod(0o755)

    def start(self, train: str, **env: str) -> tuple[int, str, list[str]]:
        """Exit code, what it said, and what the stand-ins were told."""
        told = self.folder / "told"
        told.touch()
        own = {"PATH": f"{self.folder}/bin:{os.environ['PATH']}", "TOLD": str(told)}
        own |= {"SLURM_JOB_ID": "42", "SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "n4"}
        own |= {"TRAIN": train, "CHECKPOINTS": str(self.run / "checkpoints"), **env}
        done = subprocess.run(
            ["bash", str(self.file)], env=own, capture_output=True, text=True, check=False
        )
        return done.returncode, done.stdout + done.stderr, told.read_text().splitlines()


def trained(told: list[str]) -> list[str]:
    return [line for line in told if line.startswith("llmtrain train")]


def ends_with(code: int) -> str:
    return f'echo {code} > "$LLMTRAIN_EXIT_FILE"; exit {code}'


def test_every_task_gets_its_rank_and_the_first_node_is_where_they_meet(tmp_path: Path) -> None:
    code, said, told = Job(tmp_path).start("exit 0")
    assert code == 0, said
    (line,) = trained(told)
    assert line.endswith("launch/config.yaml rank=0/1 at=10.0.0.4")


@pytest.mark.parametrize("code", [2, 3])
def test_what_a_person_has_to_look_at_is_not_tried_again(code: int, tmp_path: Path) -> None:
    ended, said, told = Job(tmp_path).start(ends_with(code))
    assert ended == code
    assert f"ended with exit code {code}" in said
    assert len(trained(told)) == 1
    assert not any("requeue" in line or "sbatch" in line for line in told)


def test_preempted_is_requeued_until_it_makes_no_progress(tmp_path: Path) -> None:
    job = Job(tmp_path)
    for step in (5, 10):
        code, _, told = job.start(f'mkdir -p "$CHECKPOINTS/step-{step:08d}"; {ends_with(75)}')
        assert code == 75
        assert told[-1] == "scontrol requeue 42"
    for last in (False, False, True):
        code, said, told = job.start(ends_with(75))
        assert code == (1 if last else 75)
    assert "stopped: 3 failures in a row without a newer checkpoint (newest step: 10)" in said
    assert told.count("scontrol requeue 42") == 4


def test_a_crash_is_tried_again_and_progress_counts_anew(tmp_path: Path) -> None:
    """Two checkpoints come, one after a failure without; then three failures in a row."""
    train = """
n=$(grep -c "^llmtrain train" "$TOLD")
case $n in 2 | 4) mkdir -p "$CHECKPOINTS/step-0000000$n" ;; esac
exit 1"""
    code, said, told = Job(tmp_path).start(train)
    assert code == 1
    assert "newest step: 4" in said
    assert len(trained(told)) == 4 + 3


def test_a_node_that_fails_is_left_out(tmp_path: Path) -> None:
    job = Job(tmp_path, "--exclude", "n9")
    code, said, told = job.start("exit 0", HEALTH="2")
    assert code == 1
    assert "fails the health check: n4" in said
    assert trained(told) == []
    (line,) = [line for line in told if line.startswith("sbatch")]
    assert "--exclude=n4,n9" in line and "--dependency=afterany:42" in line
    assert (job.run / "launch" / "jobs").read_text() == "43\n"


@pytest.mark.parametrize("why", ["unfit", "no requeue"])
def test_jobs_that_wait_for_one_that_is_submitted_again_wait_for_the_new_one(
    why: str, tmp_path: Path
) -> None:
    """Else they would wait for ever: the old one ends with a failure."""
    job, waiting = Job(tmp_path), tmp_path / "waiting"
    waiting.write_text(
        "50|afterok:42(unfulfilled)\n51|afterok:421(unfulfilled)\n52|(null)\n"
        "53|afterany:41(failed),afterok:42(unfulfilled)?afterok:7(unfulfilled)\n"
    )
    env = {"WAITING": str(waiting)}
    if why == "unfit":
        code, said, told = job.start("exit 0", HEALTH="2", **env)
    else:
        refuses = "[[ $1 == requeue ]] && exit 1\n" + STANDS_IN["scontrol"]
        (tmp_path / "bin" / "scontrol").write_text(f"#!/usr/bin/env bash\n{refuses}")
        code, said, told = job.start(ends_with(75), **env)
    assert code == (1 if why == "unfit" else 75)
    assert [line for line in told if line.startswith("scontrol update")] == [
        "scontrol update JobId=50 Dependency=afterok:43",
        "scontrol update JobId=53 Dependency=afterany:41,afterok:43?afterok:7",
    ]
    assert "job 50 waits for job 43 in its place" in said
    assert (job.run / "launch" / "jobs").read_text() == "43\n"


def test_nodes_that_all_fail_are_not_at_fault(tmp_path: Path) -> None:
    job = Job(tmp_path)
    two = STANDS_IN["scontrol"].replace("echo n4;", "echo n4; echo n5;")
    (tmp_path / "bin" / "scontrol").write_text(f"#!/usr/bin/env bash\n{two}")
    code, said, told = job.start("exit 0", HEALTH="2", SLURM_NNODES="2")
    assert code == 2 and "so it is not the nodes" in said
    assert not any(line.startswith("sbatch") for line in told)


def test_nothing_trains_while_the_nodes_do_not_reach_each_other(tmp_path: Path) -> None:
    job = Job(tmp_path, "--processes-per-node", "2")
    code, said, told = job.start("exit 0", ACROSS="2")
    assert (code, trained(told)) == (1, []), said
    assert said.count("the health check across the nodes failed") == 3
    assert len(trained(job.start("exit 0")[2])) == 1


def test_the_code_of_a_rank_that_knows_why_counts(tmp_path: Path) -> None:
    """The first one was left waiting; and what an earlier start left does not count."""
    job = Job(tmp_path)
    other = '"$(dirname "$LLMTRAIN_EXIT_FILE")/1"'
    code, said, told = job.start(f'echo 1 > "$LLMTRAIN_EXIT_FILE"; echo 75 > {other}; exit 1')
    assert code == 75 and told[-1] == "scontrol requeue 42", said
    (job.run / "launch" / "exit" / "7").write_text("2\n")
    code, said, told = job.start('[[ $(grep -c "^llmtrain t" "$TOLD") -gt 2 ]]')
    assert (code, len(trained(told))) == (0, 3), said


def test_the_signal_before_the_limit_is_passed_on_and_requeues(tmp_path: Path) -> None:
    wait = "kill -USR1 $PPID; for i in {1..999999}; do :; done"
    train = f"trap 'echo saves >> \"$TOLD\"; exit 1' USR1; {wait}"
    job = Job(tmp_path)
    code, said, told = job.start(train)
    assert code == 75 and "the time limit is near" in said
    assert told[-2:] == ["saves", "scontrol requeue 42"]
    assert (job.run / "launch" / "progress").read_text() == "-1 1\n"  # counted once


def test_what_is_cancelled_does_not_come_back(tmp_path: Path) -> None:
    code, said, told = Job(tmp_path).start("kill -TERM $PPID; exit 1")
    assert (code, len(trained(told))) == (143, 1), said
    assert not any("requeue" in line or "sbatch" in line for line in told)


def test_a_task_uses_the_cores_that_slurm_gives_it(tmp_path: Path) -> None:
    _, _, told = Job(tmp_path).start('echo "$LLMTRAIN_THREADS" >> "$TOLD"', SLURM_CPUS_PER_TASK="6")
    assert told[-1] == "6"


def test_where_requeueing_is_forbidden_excluded_nodes_stay_out(tmp_path: Path) -> None:
    job = Job(tmp_path, "--exclude", "n9")
    refuses = "[[ $1 == requeue ]] && exit 1\n" + STANDS_IN["scontrol"]
    (tmp_path / "bin" / "scontrol").write_text(f"#!/usr/bin/env bash\n{refuses}")
    code, said, told = job.start(ends_with(75))
    assert code == 75 and "submitted again as job 43" in said
    (line,) = [line for line in told if line.startswith("sbatch")]
    assert "--exclude=n9" in line


def test_a_count_that_cannot_be_written_ends_the_job(tmp_path: Path) -> None:
    """On a full disk it would try for ever."""
    job = Job(tmp_path)
    full = '[[ -d $R ]] || mkdir "$R"; [[ $(grep -c "^llmtrain t" "$TOLD") -gt 8 ]] || exit 1'
    code, said, told = job.start(full, R=str(job.run / "launch" / "progress.new"))
    assert (code, len(trained(told))) == (1, 1), said
    assert "progress cannot be written" in said


def test_pyxis_and_apptainer(tmp_path: Path) -> None:
    first, second = tmp_path / "pyxis", tmp_path / "apptainer"
    first.mkdir()
    second.mkdir()
    words = ["--container", "reg.example#llmtrain:1", "--mount", "/data:/data", "--no-health-check"]
    _, _, told = Job(first, *words).start("exit 0")
    assert "--container-image=reg.example#llmtrain:1" in told
    (mounts,) = [line for line in told if line.startswith("--container-mounts=")]
    assert mounts.endswith(f"{first}/runs/quickstart:{first}/runs/quickstart,/data:/data")
    _, _, told = Job(second, *words, "--container-runtime", "apptainer").start("exit 0")
    assert len(trained(told)) == 1
    (line,) = [line for line in told if line.startswith("apptainer exec")]
    assert "--nv" not in line and "reg.example#llmtrain:1 bash -c" in line


@pytest.mark.parametrize("runtime", ["pyxis", "apptainer"])
def test_a_container_has_the_environment_of_who_submits_and_no_command_line_shows_it(
    runtime: str, tmp_path: Path
) -> None:
    """srun, pyxis and apptainer hand it on by themselves."""
    words = ["--container", "i:1", "--container-runtime", runtime, "--no-health-check"]
    secret = {"AWS_SECRET_ACCESS_KEY": "value-of-it"}
    _, _, told = Job(tmp_path, *words).start(
        'echo "has ${AWS_SECRET_ACCESS_KEY:0:8}" >> "$TOLD"', **secret
    )
    assert told[-1] == "has value-of"
    assert not any("value-of-it" in line for line in told)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--nodes", "2", "--gpus-per-node", "3"], "train.global_batch_size: 8 cannot be shared"),
        (["--nodes", "0", *CPUS], "--nodes 0: must be 1 or more"),
        (["--gpus-per-node", "2", "--processes-per-node", "4"], "a node has 2 GPUs"),
        ([*CPUS, "device=cuda"], "device: cuda needs --gpus-per-node"),
        ([*CPUS, "--time", "5"], "leaves no time to train"),
        ([*CPUS, "--time", "noon"], "--time 'noon': write"),
        ([*CPUS, "--sbatch", "--account=x"], "without dashes"),
        ([*CPUS, "--sbatch", "nodes=3"], "--sbatch nodes: use --nodes"),
        ([*CPUS, "--sbatch", "exclude=n3"], "--sbatch exclude: use --exclude"),
        ([*CPUS, "--sbatch", "export=WANDB_API_KEY=abcdef0123"], "secret of $WANDB_API_KEY"),
        ([*CPUS, "model.d_modle=3"], "did you mean"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_is_written(
    words: list[str],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "abcdef0123")
    # An option whose value begins with a dash needs the equals sign.
    joined = " ".join(words).replace("--sbatch --", "--sbatch=--").split()
    assert main(["launch", "slurm", CONFIG, f"out={tmp_path}", *joined]) == 2
    said = capsys.readouterr().err
    assert sentence in said and "abcdef0123" not in said
    assert list(tmp_path.iterdir()) == []


def test_a_machine_without_slurm_is_told_plainly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["launch", "slurm", CONFIG, f"out={tmp_path}", *CPUS]) == 2
    assert "sbatch is not on the PATH" in capsys.readouterr().err
    assert main(["launch", "status", f"{tmp_path}/quickstart"]) == 2
    assert "no job was submitted" in capsys.readouterr().err


def test_submitting_and_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = {"sbatch": "echo '77;cluster'", "squeue": "echo '77|RUNNING|1:00 of 5:00 on n1'"}
    for name, body in answers.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert main(["launch", "slurm", CONFIG, f"out={tmp_path}/runs", *CPUS]) == 0
    assert "submitted job 77: 1 nodes x 1 processes" in capsys.readouterr().out
    (tmp_path / "runs/quickstart/checkpoints/step-00000120").mkdir(parents=True)
    assert main(["launch", "status", f"{tmp_path}/runs/quickstart"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0].split()[:2] == ["77", "RUNNING"]
    assert out.endswith("newest checkpoint: step 120\n")
    # Later SLURM has forgotten the job, and its accounting, where there is one, has not.
    (tmp_path / "squeue").write_text("#!/bin/sh\n")
    assert main(["launch", "status", f"{tmp_path}/runs/quickstart"]) == 0
    assert capsys.readouterr().out.splitlines()[0].split() == ["77", "ended"]
    (tmp_path / "sacct").write_text("#!/bin/sh\necho '77|NODE_FAIL|02:00:01'\n")
    (tmp_path / "sacct").chmod(0o755)
    assert main(["launch", "status", f"{tmp_path}/runs/quickstart"]) == 0
    assert capsys.readouterr().out.splitlines()[0].split() == ["77", "NODE_FAIL", "02:00:01"]


def test_a_run_whose_job_is_queued_is_not_submitted_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its files would change under the job; and a SLURM that is silent has not ended it."""
    answers = {"sbatch": "echo 77", "squeue": "echo '77|PENDING|'"}
    for name, body in answers.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    line = ["launch", "slurm", CONFIG, f"out={tmp_path}/runs", *CPUS]
    run = tmp_path / "runs" / "quickstart"
    assert main(line) == 0
    before = (run / "launch" / "config.yaml").read_text()
    assert main([*line, "seed=8", "--dry-run"]) == 2
    assert "job 77 of this run is PENDING" in capsys.readouterr().err
    assert (run / "launch" / "config.yaml").read_text() == before
    (tmp_path / "squeue").write_text("#!/bin/sh\necho 'cannot reach it' >&2; exit 1\n")
    for words in (line, ["launch", "status", str(run)]):
        assert main(words) == 2
        assert "squeue gives no answer: cannot reach it" in capsys.readouterr().err
    (tmp_path / "squeue").write_text("#!/bin/sh\necho '78|RUNNING|'\n")
    assert main(line) == 0


def test_the_words_for_slurm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--nodes", "4", "--gpus-per-node", "2", "--time", "1-12", "--partition", "big"]
    more = ["--sbatch", "account=a b", "--sbatch", "exclusive", "--warning", "600"]
    line = ["launch", "slurm", CONFIG, f"out={tmp_path}", *words, *more, "--dry-run"]
    assert main(line) == 0
    asked = [x[10:] for x in capsys.readouterr().out.splitlines() if x.startswith("#SBATCH --")]
    for wanted in ("nodes=4", "ntasks-per-node=2", "gpus-per-node=2", "time=1-12", "requeue"):
        assert wanted in asked
    for wanted in ("signal=B:USR1@600", "partition=big", "account='a b'", "exclusive"):
        assert wanted in asked


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 5400), ("90:30", 5430), ("2:00:05", 7205), ("1-12", 129600), ("1-00:30", 88200)],
)
def test_time_limits_are_read_as_slurm_reads_them(text: str, seconds: int) -> None:
    assert time_limit(text) == seconds


def test_a_wrong_time_limit() -> None:
    with pytest.raises(ConfigError):
        time_limit("1-2-3")


def test_the_template_is_what_the_launch_folder_shows_and_shellcheck_likes_it() -> None:
    assert (ROOT / "launch" / "slurm" / "train.sbatch").resolve() == TEMPLATE
    subprocess.run(["bash", "-n", str(TEMPLATE)], check=True)
    if shutil.which("shellcheck"):
        scripts = [TEMPLATE, *(ROOT / "launch").rglob("*.sh")]
        done = subprocess.run(
            ["shellcheck", *map(str, scripts)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout
