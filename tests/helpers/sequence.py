"""Configs of short sequences of tasks, for the tests of ``llmtrain continual``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from helpers.tiny import tiny_config

from llmtrain.cli.main import main

STEPS = 12
TASKS: list[dict[str, Any]] = [
    {"name": "a", "weights": {"letters": 1}},
    {"name": "b", "weights": {"digits": 1}},
]
THREE = [*TASKS, {"name": "c", "weights": {"letters": 1, "digits": 1}, "domains": ["letters"]}]


def sequence_config(folder: Path, corpus: Path, tasks: list[dict[str, Any]], **method: Any) -> Path:
    folder.mkdir(exist_ok=True)
    file = tiny_config(folder, corpus, train__duration=f"{STEPS}step", name="seq")
    text = yaml.safe_load(file.read_text())
    del text["data"]["phases"]
    text["continual"] = {"tasks": tasks, **method}
    file.write_text(yaml.safe_dump(text))
    return file


def run_sequence(folder: Path, corpus: Path, tasks: list[dict[str, Any]], **method: Any) -> Path:
    """Run a sequence in this process; returns its folder."""
    assert main(["continual", str(sequence_config(folder, corpus, tasks, **method))]) == 0
    return folder / "runs" / "seq"
