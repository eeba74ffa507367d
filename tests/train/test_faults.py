"""Faults of data, disk and numbers in a real run: one sentence, the exit code, nothing lost."""

import os
import resource
import shutil
import subprocess
from pathlib import Path

import pytest
from helpers.tiny import command, environment, llmtrain, records, tiny_config

from llmtrain.cli.main import main


@pytest.fixture
def own(tmp_path: Path, corpus: Path) -> Path:
    """A corpus that may be damaged."""
    return Path(shutil.copytree(corpus, tmp_path / "corpus"))


def fails(capsys: pytest.CaptureFixture[str], config: Path, *overrides: str, code: int = 2) -> str:
    assert main(["train", str(config), *overrides]) == code
    err = capsys.readouterr().err
    assert "Traceback" not in err
    return err


def test_a_truncated_shard_is_named(
    tmp_path: Path, own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = next((own / "letters" / "train").glob("*.mds"))
    shard.write_bytes(shard.read_bytes()[:-100])
    assert shard.name in fails(capsys, tiny_config(tmp_path, own))


def test_a_missing_tokenizer_is_named(
    tmp_path: Path, own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (own / "tokenizer.json").unlink()
    assert "tokenizer.json" in fails(capsys, tiny_config(tmp_path, own))


def test_a_missing_corpus_says_how_to_make_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    err = fails(capsys, tiny_config(tmp_path, tmp_path / "nowhere"))
    assert "data.corpus" in err
    assert "llmtrain data prepare" in err


def test_a_run_folder_that_cannot_be_written_is_named(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    assert "file" in fails(capsys, tiny_config(tmp_path, corpus), f"out={tmp_path / 'file'}")


def test_too_many_shards_for_the_processes(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    err = fails(capsys, tiny_config(tmp_path, corpus), "parallel.shard=4")
    assert "parallel.shard" in err


def test_another_model_does_not_take_the_checkpoint(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(tmp_path, corpus, train__duration="4step")
    assert main(["train", str(config), "train.stop_after=2step"]) == 0
    assert "shape" in fails(capsys, config, "model.d_model=64")
    err = fails(capsys, config, "train.global_batch_size=16")
    assert "train.global_batch_size=8" in err
    assert "seed" in fails(capsys, config, "seed=8")
    assert "move with train.duration" in fails(capsys, config, "train.duration=2step")


def test_a_diverging_run_stops_with_code_3_and_names_the_samples(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(tmp_path, corpus, checkpoint__every="1step")
    err = fails(capsys, config, "optim.lr=1e30", "optim.clip_norm=null", code=3)
    assert "not finite" in err
    assert "samples" in err
    run = tmp_path / "runs" / "tiny"
    assert "not finite" in records(run, "event")[-1]["text"]


def test_skipping_goes_on_after_a_bad_step(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One step's gradient is poisoned; the run skips it and ends with finite weights."""
    import sys
    import types

    from llmtrain.train import Hook

    class Poison(Hook):
        def after_backward(self, trainer) -> None:
            if trainer.step_done == 2:
                next(iter(trainer.module.params.values())).grad.fill_(float("nan"))

    module = types.ModuleType("poison")
    module.Poison = Poison  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "poison", module)
    config = tiny_config(
        tmp_path,
        corpus,
        train__duration="6step",
        guard={"nonfinite": "skip"},
        hooks=[{"use": "poison:Poison"}],
    )
    assert main(["train", str(config)]) == 0
    run = tmp_path / "runs" / "tiny"
    assert any("update skipped" in e["text"] for e in records(run, "event"))
    assert records(run)[-1]["loss"] < records(run)[0]["loss"]


@pytest.mark.dist
def test_a_full_disk_is_a_sentence_and_the_last_good_checkpoint_resumes(
    tmp_path: Path, corpus: Path
) -> None:
    config = tiny_config(tmp_path, corpus, checkpoint__asynchronous=True)
    first = llmtrain("train", str(config), "train.stop_after=5step")
    assert first.returncode == 0

    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))

    full = subprocess.run(
        command("train", str(config)),
        env=environment(),
        capture_output=True,
        text=True,
        preexec_fn=small_files,
        check=False,
    )
    assert full.returncode == 2, full.stderr
    assert "Traceback" not in full.stderr
    assert "step-" in full.stderr
    run = tmp_path / "runs" / "tiny"
    assert not list((run / "checkpoints").glob(".tmp*"))
    done = llmtrain("train", str(config))
    assert done.returncode == 0, done.stderr
    assert "resumed from" in done.stdout
    assert [r["step"] for r in records(run)] == list(range(1, 21))
    assert os.path.exists(run / "checkpoints" / "step-00000020")
