"""Exact restart: killed, resumed, killed in a save, resumed again, and still the same bits."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.stored import stored_bits
from helpers.tiny import begun, environment, llmtrain, make_corpus, records, tiny_config

STEPS = 20


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """The uninterrupted run."""
    folder = tmp_path_factory.mktemp("straight")
    done = llmtrain("train", str(tiny_config(folder, corpus)))
    assert done.returncode == 0, done.stderr
    return folder / "runs" / "tiny"


def trajectory(run: Path) -> list[tuple[int, float, float, float, str]]:
    return [
        (r["step"], r["loss"], r["grad_norm"], r["lr"], str(r["sources"])) for r in records(run)
    ]


def run_until(config: Path, sees: str, number: int, where: Path) -> None:
    """Start the run and kill -9 it as soon as ``where`` has a file named like ``sees``."""
    process = begun("train", str(config))
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if not process.runs():
            raise AssertionError(f"ended by itself with {process.wait().returncode}")
        if where.exists() and len(list(where.glob(sees))) >= number:
            break
        time.sleep(0.0005)
    os.kill(process.pids[0], signal.SIGKILL)
    process.wait()


@pytest.mark.dist
def test_killed_twice_and_resumed_is_bit_identical(
    tmp_path: Path, corpus: Path, straight: Path
) -> None:
    config = tiny_config(tmp_path, corpus)
    run = tmp_path / "runs" / "tiny"
    checkpoints = run / "checkpoints"
    run_until(config, "step-*", 1, checkpoints)
    run_until(config, ".tmp-step-*", 1, checkpoints)
    done = llmtrain("train", str(config))
    assert done.returncode == 0, done.stderr
    assert "resumed from" in done.stdout
    assert trajectory(run) == trajectory(straight)
    assert stored_bits(run) == stored_bits(straight)


@pytest.mark.dist
def test_half_a_run_then_the_other_half(tmp_path: Path, corpus: Path, straight: Path) -> None:
    config = tiny_config(tmp_path, corpus)
    run = tmp_path / "runs" / "tiny"
    half = llmtrain("train", str(config), "train.stop_after=10step", "log.every=1")
    assert half.returncode == 0, half.stderr
    assert records(run)[-1]["step"] == 10
    rest = llmtrain("train", str(config))
    assert rest.returncode == 0, rest.stderr
    assert "resumed from" in rest.stdout
    assert trajectory(run) == trajectory(straight)
    assert stored_bits(run) == stored_bits(straight)


@pytest.mark.dist
def test_resume_on_two_ranks_and_back_with_another_micro_batch(
    tmp_path: Path, corpus: Path, straight: Path
) -> None:
    config = tiny_config(tmp_path, corpus)
    run = tmp_path / "runs" / "tiny"
    for ranks, changes in (
        (1, ["train.stop_after=6step", "train.micro_batch_size=4"]),
        (2, ["train.stop_after=13step", "train.micro_batch_size=1"]),
        (1, ["train.micro_batch_size=2"]),
    ):
        done = llmtrain("train", str(config), *changes, ranks=ranks)
        assert done.returncode == 0, done.stderr
    for (step, loss, norm, lr, _), (step0, loss0, norm0, lr0, _) in zip(
        trajectory(run), trajectory(straight), strict=True
    ):
        assert (step, lr) == (step0, lr0)
        # The round-off of fp32 sums in another order (see test_layouts.py).
        assert loss == pytest.approx(loss0, rel=5e-7)
        assert norm == pytest.approx(norm0, rel=3e-6)
    seen = [r["sources"] for r in records(run)]
    expected = [r["sources"] for r in records(straight)]
    for ours, theirs in zip(seen, expected, strict=True):
        for name, source in theirs.items():
            assert ours[name]["tokens"] == source["tokens"]


@pytest.mark.dist
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_finishes_the_step_saves_and_exits_75(
    tmp_path: Path, corpus: Path, straight: Path, number: signal.Signals
) -> None:
    config = tiny_config(tmp_path, corpus)
    run = tmp_path / "runs" / "tiny"
    process = begun("train", str(config))
    end = time.monotonic() + 60
    while not (run / "metrics.jsonl").exists() or not records(run):
        assert time.monotonic() < end
        time.sleep(0.001)
    os.kill(process.pids[0], number)
    done = process.wait()
    assert done.returncode == 75, done.stderr
    assert "preempted" in done.stderr
    stopped = records(run)[-1]["step"]
    assert (run / "checkpoints" / f"step-{stopped:08d}").exists()
    done = llmtrain("train", str(config))
    assert done.returncode == 0, done.stderr
    assert trajectory(run) == trajectory(straight)
    assert stored_bits(run) == stored_bits(straight)


@pytest.mark.dist
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_resumes(
    tmp_path: Path, corpus: Path, straight: Path
) -> None:
    shutil.copytree(straight, tmp_path / "runs" / "tiny")
    run = tmp_path / "runs" / "tiny"
    config = tiny_config(tmp_path, corpus)
    newest = run / "checkpoints" / f"step-{STEPS:08d}"
    victim = next(newest.glob("*.safetensors"))
    data = bytearray(victim.read_bytes())
    data[-100] ^= 1
    victim.write_bytes(bytes(data))
    done = llmtrain("train", str(config))
    assert done.returncode == 0, done.stderr
    assert victim.name in done.stderr
    assert "resumed from" in done.stdout
    assert trajectory(run) == trajectory(straight)
    assert stored_bits(run) == stored_bits(straight)


@pytest.mark.dist
def test_a_run_begun_from_a_path_goes_on_from_its_own_checkpoints(
    tmp_path: Path, corpus: Path, straight: Path
) -> None:
    """The same command again, as after a preemption, does not begin at the path once more."""
    config = tiny_config(tmp_path, corpus)
    start = straight / "checkpoints" / "step-00000010"
    start = start if start.exists() else sorted((straight / "checkpoints").glob("step-*"))[0]
    begun = ["train", str(config), "--resume", str(start)]
    first = llmtrain(*begun, "train.stop_after=17step")
    assert first.returncode == 0, first.stderr
    second = llmtrain(*begun)
    assert second.returncode == 0, second.stderr
    assert "step-00000017" in second.stdout
    run = tmp_path / "runs" / "tiny"
    assert stored_bits(run) == stored_bits(straight)


@pytest.mark.dist
def test_the_local_launcher_passes_signals_on_and_keeps_the_exit_code(
    tmp_path: Path, corpus: Path
) -> None:
    config = tiny_config(tmp_path, corpus, train__duration="4000step", eval__every=None)
    run = tmp_path / "runs" / "tiny"
    launcher = Path(__file__).parents[2] / "launch" / "local.sh"
    process = subprocess.Popen(
        [str(launcher), str(config)],
        env=environment(NPROC="2", PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    end = time.monotonic() + 90
    while not (run / "metrics.jsonl").exists() or not records(run):
        assert time.monotonic() < end
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    stopped = records(run)[-1]["step"]
    assert (run / "checkpoints" / f"step-{stopped:08d}").exists()


@pytest.mark.dist
def test_branches_on_two_ranks_one_after_the_other(
    tmp_path: Path, corpus: Path, straight: Path
) -> None:
    """Several runs in one launch; the tree is recorded once, the data is what one rank sees."""
    shutil.copytree(straight, tmp_path / "runs" / "tiny")
    trunk = tmp_path / "runs" / "tiny"
    words = ["branch", str(trunk), "--sweep", "0.25,0.5", f"out={trunk.parent}"]
    done = llmtrain(*words, "log.every=1", ranks=2)
    assert done.returncode == 0, done.stderr
    for name, step in (("tiny-branch-d0.25", 15), ("tiny-branch-d0.5", 10)):
        ours = records(trunk.parent / name)
        theirs = [r for r in records(straight) if r["step"] > step]
        assert [r["step"] for r in ours] == [r["step"] for r in theirs]
        assert ours[-1]["loss"] == pytest.approx(theirs[-1]["loss"], rel=2e-5)
        assert (trunk / "branches" / f"{name}.json").exists()
        tokens = [{n: s["tokens"] for n, s in r["sources"].items()} for r in (ours[-1], theirs[-1])]
        assert tokens[0] == tokens[1]
    assert done.stdout.count("held-out loss:") == 1
