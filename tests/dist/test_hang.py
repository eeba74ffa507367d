"""A rank that hangs under torchrun: named, ended with its stack, and the run started again."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from helpers.tiny import command, environment, make_corpus, records, tiny_config

HOOK = """
import os, time
from pathlib import Path
from llmtrain.train import Hook


class Hang(Hook):
    def after_step(self, trainer, result):
        if trainer.world.rank == 1:
            time.sleep(0.05)
            mark = Path(os.environ["HANG_MARK"])
            if result.step == 3 and not mark.exists():
                mark.touch()
                self.never_returns()

    def never_returns(self):
        time.sleep(1000)
"""


@pytest.mark.dist
def test_a_rank_that_hangs_is_named_and_the_launcher_starts_the_run_again(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path, documents=40)
    (tmp_path / "hang_hook.py").write_text(HOOK)
    changes = {
        "train__duration": "6step",
        "eval__every": None,
        "checkpoint__every": "2step",
        "hooks": [{"use": "hang_hook:Hang"}],
        "train__watchdog": {"seconds": 3, "evaluation": 3, "checkpoint": 60, "start": 60},
    }
    config = tiny_config(tmp_path, corpus, **changes)
    words = command("train", str(config), ranks=2)
    words.insert(words.index("--standalone") + 1, "--max-restarts=1")
    path = f"{environment()['PYTHONPATH']}:{tmp_path}"
    done = subprocess.run(
        words,
        env=environment(HANG_MARK=str(tmp_path / "mark"), PYTHONPATH=path),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "watchdog: rank 1 of 2 stood in hooks after step 3" in done.stderr
    assert "hang_hook.py:17 (never_returns)" in done.stderr
    run = tmp_path / "runs" / "tiny"
    assert "never_returns" in (run / "watch" / "earlier-stacks-rank-1.txt").read_text()
    events = [event["text"] for event in records(run, "event")]
    assert any(text.startswith("before: rank 1 of 2 stood in hooks") for text in events)
    assert [record["step"] for record in records(run)] == [1, 2, 3, 4, 5, 6]
    assert records(run)[-1]["ranks"]["slowest"] == 1
