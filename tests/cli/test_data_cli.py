"""``llmtrain data``: from a YAML file to a corpus and a look at it."""

from __future__ import annotations

import json
import sys
from types import ModuleType

import pytest

from llmtrain.cli.main import main

CONFIG = """
prepare:
  out: {root}/corpus
  workers: 1
  heldout_fraction: 0.1
  tokenizer: {{kind: byte}}
  sources:
    notes: {{kind: text, paths: ["{root}/notes/*.txt"]}}
"""


@pytest.fixture
def config(tmp_path):
    (tmp_path / "notes").mkdir()
    for number in range(40):
        (tmp_path / f"notes/{number}.txt").write_text(f"note number {number}\n")
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG.format(root=tmp_path))
    return path


def test_prepare_inspect_and_again(config, tmp_path, capsys):
    assert main(["data", "prepare", str(config)]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == f"corpus ready: {tmp_path}/corpus"
    manifest = json.loads((tmp_path / "corpus/manifest.json").read_text())
    entry = manifest["sources"]["notes"]
    assert entry["train"]["documents"] + entry["heldout"]["documents"] == 40
    assert main(["data", "prepare", str(config), "--workers", "2"]) == 0
    assert "already complete" in capsys.readouterr().out
    assert main(["data", "inspect", f"{tmp_path}/corpus", "--verify", "--samples", "2"]) == 0
    out = capsys.readouterr().out
    assert f"notes/train: {entry['train']['documents']} documents" in out
    assert "note number" in out


def test_other_settings_need_force(config, tmp_path, capsys):
    assert main(["data", "prepare", str(config)]) == 0
    other = ["data", "prepare", str(config), "prepare.heldout_fraction=0.5"]
    assert main(other) == 2
    err = capsys.readouterr().err
    assert "prepare.heldout_fraction was 0.1, now 0.5" in err
    assert len(err.splitlines()) == 1
    assert main([*other, "--force"]) == 0
    manifest = json.loads((tmp_path / "corpus/manifest.json").read_text())
    assert manifest["heldout_fraction"] == 0.5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["prepare", "{config}", "--workers", "0"], "--workers must be at least 1"),
        (["prepare", "{config}", "prepare=null"], "has no section `prepare`"),
        (["inspect", "{root}/nowhere"], "nowhere"),
        (["inspect", "{root}", "--format", "mdz"], "--format mdz is not known; choose from auto"),
        ([], "prepare|inspect|plan"),
    ],
)
def test_faults_are_one_line(config, tmp_path, capsys, words, message):
    filled = [word.format(config=config, root=tmp_path) for word in words]
    assert main(["data", *filled]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert len(err.splitlines()) == 1


def test_plan_prints_the_report(config, monkeypatch, capsys):
    stand_in = ModuleType("llmtrain.data.plan")
    stand_in.plan_report = lambda cfg: f"plan for seed {cfg.seed}"
    monkeypatch.setitem(sys.modules, "llmtrain.data.plan", stand_in)
    assert main(["data", "plan", str(config), "seed=5"]) == 0
    assert capsys.readouterr().out == "plan for seed 5\n"
