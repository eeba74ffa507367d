"""Tokens and keys of the environment stay there: not in configs, logs, metrics, reports, jobs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.local import LocalFileSystem
from helpers.tiny import make_corpus, records, tiny_config

from llmtrain.checkpoint import objects
from llmtrain.cli.main import main
from llmtrain.errors import EnvironmentFault

SECRETS = {
    "HF_TOKEN": "hf_aVerySecretToken",
    "WANDB_API_KEY": "0123456789secret",
    "AWS_SECRET_ACCESS_KEY": "wJalr/secret+word",
    "AZURE_STORAGE_CONNECTION_STRING": "AccountKey=secret-at-azure",
}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)


def test_a_run_its_report_and_its_job_hold_none(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a store fails and says in its error what it was given."""

    def put_file(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(f"signed with {SECRETS['AWS_SECRET_ACCESS_KEY']}: denied")

    monkeypatch.setattr(LocalFileSystem, "put_file", put_file)
    monkeypatch.setattr(objects, "FIRST_WAIT", 0.001)
    changes = {"train__duration": "2step", "eval__every": None, "checkpoint__every": "2step"}
    corpus = make_corpus(tmp_path, documents=40)
    config = str(tiny_config(tmp_path, corpus, **changes, checkpoint__remote=f"{tmp_path}/away"))
    run = tmp_path / "runs" / "tiny"
    assert main(["train", config]) == 0
    assert main(["report", str(run)]) == 0
    assert main(["launch", "slurm", config, "--gpus-per-node", "0", "--dry-run"]) == 0
    assert main(["train", config, "--print-config"]) == 0
    (event,) = [e["text"] for e in records(run, "event") if "not copied" in e["text"]]
    assert "signed with $AWS_SECRET_ACCESS_KEY: denied" in event
    captured = capfd.readouterr()
    assert "$AWS_SECRET_ACCESS_KEY" in captured.err
    written = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert {"metrics.jsonl", "report.html", "job.sbatch", "config.yaml"} <= {
        p.name for p in written
    }
    for secret in SECRETS.values():
        assert secret not in captured.out + captured.err
        assert not [path for path, data in written.items() if secret.encode() in data]


def test_a_config_takes_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(tiny_config(tmp_path, tmp_path))
    words = [
        "train",
        config,
        "--print-config",
        "hooks=[{use: 'a:B', args: {k: 'x-${oc.env:HF_TOKEN}'}}]",
    ]
    assert main(words) == 2
    said = capsys.readouterr()
    assert "holds the secret in $HF_TOKEN" in said.err and "hooks.0.args.k" in said.err
    assert SECRETS["HF_TOKEN"] not in said.out + said.err
    # The shell has put it there: k=$HF_TOKEN.
    words[-1] = f"hooks=[{{use: 'a:B', args: {{k: {SECRETS['HF_TOKEN']}}}}}]"
    assert main(words) == 2
    said = capsys.readouterr()
    assert "hooks.0.args.k" in said.err and SECRETS["HF_TOKEN"] not in said.out + said.err


def test_signed_addresses_and_json_hold_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """A session token stands escaped in the address that a store's error quotes."""
    monkeypatch.setenv("AWS_SESSION_TOKEN", 'FwoG/x+y==" z')
    text = "GET https://b/k?X-Amz-Security-Token=FwoG%2Fx%2By%3D%3D%22%20z&a=1"
    assert str(EnvironmentFault(text)).endswith("Token=$AWS_SESSION_TOKEN&a=1")
    assert str(EnvironmentFault('{"t": "FwoG/x+y==\\" z"}')) == '{"t": "$AWS_SESSION_TOKEN"}'
    # One secret that another one begins with.
    monkeypatch.setenv("AAA_TOKEN", "FwoG/x+y")
    assert str(EnvironmentFault('FwoG/x+y==" z')) == "$AWS_SESSION_TOKEN"


def test_a_traceback_holds_none() -> None:
    """Of a mistake of ours, or of a hook's."""
    program = """
import os
from llmtrain.cli import main
def fail():
    raise RuntimeError("401 for " + os.environ["HF_TOKEN"])
main.main = fail
main.entry()
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and "401 for $HF_TOKEN" in done.stderr
    assert SECRETS["HF_TOKEN"] not in done.stderr


def test_short_values_and_other_variables_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "perhaps-not")
    monkeypatch.setenv("SHORT_TOKEN", "true")
    text = "it is true, perhaps-not"
    assert str(EnvironmentFault(text)) == text
