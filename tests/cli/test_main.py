"""The command's frame: finding subcommands, one-sentence errors, exit codes, quick help."""

from __future__ import annotations

import argparse
import errno
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import llmtrain
from llmtrain import errors
from llmtrain.cli import main as frame
from llmtrain.cli.main import COMMANDS, main

ROOT = Path(llmtrain.__file__).parents[1]


def command(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """The real command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "llmtrain", *words],
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        **options,
    )


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes ``llmtrain train`` raise, or return, what the test says."""

    def install(outcome: Any, **arguments: Any) -> None:
        def run(args: argparse.Namespace) -> int:
            if isinstance(outcome, BaseException):
                raise outcome
            result: int = outcome(args) if callable(outcome) else outcome
            return result

        def add_arguments(parser: argparse.ArgumentParser) -> None:
            parser.add_argument("config", nargs="?")
            parser.add_argument("overrides", nargs="*")
            parser.add_argument("--dry-run", action="store_true")

        module = SimpleNamespace(HELP="x", run=run, add_arguments=add_arguments)
        monkeypatch.setattr(frame, "_module", lambda name: module)

    return install


def test_every_listed_command_is_there_and_explains_itself(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for name in COMMANDS:
        module = importlib.import_module(f"llmtrain.cli.{name}")
        assert f"  {name} " in text and module.HELP in text
        assert main([name, "--help"]) == 0
        assert f"usage: llmtrain {name}" in capsys.readouterr().out
    files = {p.stem for p in (ROOT / "llmtrain/cli").glob("*.py")}
    assert set(COMMANDS) <= files


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"llmtrain {llmtrain.__version__}\n"


def test_help_and_printing_a_config_load_nothing_heavy(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("seed: 1\n")
    code = (
        "import sys; from llmtrain.cli.main import main\n"
        "assert main(sys.argv[1:]) == 0\n"
        "heavy = {'torch', 'numpy', 'datasets', 'transformers', 'pyarrow'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    for words in (["--help"], ["train", "--help"], ["train", "a.yaml", "--print-config"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *words],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "'trian' is no command; did you mean 'train'?"),
        (["frobnicate"], "'frobnicate' is no command; the commands are train, branch"),
        (["--vresion"], "'--vresion' is no option"),
        (["train"], "the following arguments are required: config; see llmtrain train --help"),
        (["train", "a.yaml", "--dry-rum"], "'--dry-rum'; did you mean '--dry-run'?"),
        (["train", "a.yaml", "--optim.lr=3"], "overrides have no dashes: write optim.lr=3"),
        (["train", "a.yaml", "--dry"], "unrecognized argument '--dry'"),
        (["data", "prepar", "a.yaml"], "'prepar' is not known; did you mean 'prepare'?"),
        (["data", "plan", "a.yaml", "--forse"], "'--forse'; did you mean '--force'?"),
        (["doctor", "now"], "unrecognized argument 'now'"),
    ],
)
def test_wrong_words_are_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith("llmtrain: error: ") and message in err


def test_no_words_give_the_help_and_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "usage: llmtrain COMMAND" in capsys.readouterr().out


def test_overrides_may_stand_around_options(fake: Any) -> None:
    seen: list[argparse.Namespace] = []
    fake(lambda args: seen.append(args) or 0)
    assert main(["train", "a.yaml", "x=1", "--dry-run", "y.z=2", "v=3"]) == 0
    assert seen[0].overrides == ["x=1", "y.z=2", "v=3"] and seen[0].dry_run
    assert main(["train", "--dry-run", "a.yaml"]) == 0
    assert seen[1].overrides == []


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (errors.ConfigError("bad key"), 2, "llmtrain: error: bad key\n"),
        (errors.DataError("bad shard"), 2, "llmtrain: error: bad shard\n"),
        (errors.GuardStop("loss is nan"), 3, "llmtrain: stopped: loss is nan\n"),
        (errors.Preempted("saved at 5"), 75, "llmtrain: preempted: saved at 5\n"),
        (KeyboardInterrupt(), 130, "llmtrain: interrupted\n"),
        (
            OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/x"),
            2,
            "llmtrain: error: runs/x: no space left on device; "
            "free some space or write elsewhere\n",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "/runs"),
            2,
            "llmtrain: error: /runs: permission denied; "
            "check the rights of the file and its folder\n",
        ),
        (
            OSError(errno.EROFS, os.strerror(errno.EROFS), b"out"),
            2,
            "llmtrain: error: out: read-only file system; write elsewhere\n",
        ),
        (
            FileNotFoundError(errno.ENOENT, "No such file or directory", "x.json"),
            2,
            "llmtrain: error: x.json: no such file or directory; check the path\n",
        ),
        (
            ModuleNotFoundError("No module named 'wandb'", name="wandb"),
            2,
            "llmtrain: error: this needs the package wandb: run pip install 'llmtrain[wandb]'\n",
        ),
    ],
)
def test_errors_become_one_sentence_and_a_code(
    error: BaseException, code: int, message: str, fake: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    fake(error)
    assert main(["train"]) == code
    assert capsys.readouterr().err == message


def test_an_old_torch_is_told_by_commands_that_import_it_late(
    fake: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("llmtrain.cli.process.metadata.version", lambda name: "2.4.0")
    fake(ImportError("cannot import name 'nn' from 'torch'"))
    assert main(["train"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("llmtrain: error: torch 2.4.0 is too old") and told.count("\n") == 1


def test_a_full_disk_is_found_behind_another_error(
    fake: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    error = RuntimeError("writer thread failed")
    error.__cause__ = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    fake(error)
    assert main(["train"]) == 2
    assert "no space left on device" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        ValueError("ours"),
        AssertionError("ours"),
        ModuleNotFoundError("No module named 'llmtrain.nope'", name="llmtrain.nope"),
        FileNotFoundError("ours"),
        OSError(errno.EINVAL, "Invalid argument", "x"),
    ],
)
def test_mistakes_of_our_own_keep_their_traceback(error: Exception, fake: Any) -> None:
    fake(error)
    with pytest.raises(type(error)):
        main(["train"])


def test_the_end_of_another_process_is_no_traceback_of_ours(
    fake: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake(RuntimeError("[../pair.cc:537] Connection closed by peer [127.0.0.1]:5432"))
    with pytest.raises(RuntimeError):
        main(["train"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["train"]) == 1
    assert "another process of this run has ended" in capsys.readouterr().err


def test_a_traceback_can_be_asked_for(fake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMTRAIN_TRACEBACK", "1")
    fake(errors.DataError("bad shard"))
    with pytest.raises(errors.DataError):
        main(["train"])


@pytest.mark.parametrize(
    ("error", "rank", "local", "expected"),
    [
        (errors.ConfigError("x"), "0", "0", "llmtrain: error: x\n"),
        (errors.ConfigError("x"), "3", "3", ""),
        (errors.ConfigError("x"), "8", "0", "llmtrain: rank 8: error: x\n"),
        (errors.DataError("x"), "3", "3", "llmtrain: rank 3: error: x\n"),
        (errors.Preempted("x"), "3", "0", ""),
    ],
)
def test_ranks_do_not_all_say_the_same(
    error: Exception,
    rank: str,
    local: str,
    expected: str,
    fake: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("LOCAL_RANK", local)
    fake(error)
    assert main(["train"]) == error.exit_code  # type: ignore[attr-defined]
    assert capsys.readouterr().err == expected


def test_a_reader_that_leaves_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("")
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = command("train", str(tmp_path / "a.yaml"), "--print-config", stdout=writing)
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_output_to_a_full_disk_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("")
    with open("/dev/full", "w") as full:
        done = command("train", str(tmp_path / "a.yaml"), "--print-config", stdout=full)
    assert done.returncode == 2
    assert "no space left on device" in done.stderr and "Traceback" not in done.stderr


def test_print_config_reproduces_the_run(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("model: {d_model: 64}\ndata: {corpus: c}\n")
    (tmp_path / "a.yaml").write_text("base: base.yaml\ndata: {weights: {code: 1}}\n")
    first = command(
        *("train", str(tmp_path / "a.yaml"), "--print-config", "optim.lr=1e-4", "name=no"),
        stdout=subprocess.PIPE,
    )
    (tmp_path / "b.yaml").write_text(first.stdout)
    second = command("train", str(tmp_path / "b.yaml"), "--print-config", stdout=subprocess.PIPE)
    assert first.returncode == second.returncode == 0
    assert first.stdout == second.stdout
    assert "d_model: 64" in first.stdout and "lr: 0.0001" in first.stdout


def test_doctor_tells_what_works(capsys: pytest.CaptureFixture[str]) -> None:
    from llmtrain.cli.diagnosis import diagnose

    checks = {check.name: check for check in diagnose()}
    for name in ("python", "packages", "torch", "cores", "temporary files"):
        assert checks[name].works, checks[name]
    for check in checks.values():
        assert check.detail and "\n" not in check.detail
    assert main(["doctor", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [c["name"] for c in told["checks"]] == list(checks)


def test_doctor_fails_without_what_training_needs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from llmtrain.cli import diagnosis

    monkeypatch.setattr(diagnosis, "OLDEST_TORCH", (99, 0))
    monkeypatch.setattr(diagnosis, "NEEDED", ("numpy", "surely_not_there"))
    monkeypatch.setattr(diagnosis, "_streaming", lambda: 1 / 0)
    assert main(["doctor"]) == 2
    out = capsys.readouterr().out
    assert "is too old: pip install 'torch>=99.0'" in out
    assert "missing: pip install surely_not_there" in out
    assert "no   streaming        division by zero" in out
    assert out.endswith("before this is put right: packages, torch.\n")
