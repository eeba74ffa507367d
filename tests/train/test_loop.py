"""The loop's own bookkeeping: which rate an update gets, and what a resume brings back."""

import json
import math
import sys
import types
from pathlib import Path

import pytest
from helpers.tiny import records, tiny_config

from llmtrain.cli.main import main
from llmtrain.train import Hook

PEAK, WARMUP, TOTAL, LOWEST = 3e-3, 3, 8, 0.1


def expected_rate(update: int) -> float:
    """Of update 1, 2, ...: a line to the peak at update WARMUP, then a cosine to the end."""
    if update <= WARMUP:
        return PEAK * update / WARMUP
    progress = (update - WARMUP) / (TOTAL - WARMUP)
    return PEAK * (LOWEST + (1 - LOWEST) * 0.5 * (1 + math.cos(math.pi * progress)))


def test_every_update_is_made_at_the_rate_of_its_own_step(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Across a resume, and in the optimizer as in the records."""
    used: list[float] = []

    class Watch(Hook):
        def after_step(self, trainer, result) -> None:
            (rate,) = {
                group["lr"] / group["lr_factor"] for group in trainer.module.optimizer.param_groups
            }
            used.append(rate)

    module = types.ModuleType("watch")
    module.Watch = Watch  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "watch", module)
    config = tiny_config(
        tmp_path,
        corpus,
        train__duration=f"{TOTAL}step",
        optim__lr=PEAK,
        schedule={"name": "cosine", "warmup": f"{WARMUP}step", "min_factor": LOWEST},
        eval__every=None,
        hooks=[{"use": "watch:Watch"}],
    )
    assert main(["train", str(config), "train.stop_after=5step"]) == 0
    assert main(["train", str(config)]) == 0
    expected = [expected_rate(update) for update in range(1, TOTAL + 1)]
    assert used == pytest.approx(expected, rel=1e-12)
    assert [r["lr"] for r in records(tmp_path / "runs" / "tiny")] == pytest.approx(expected)


def test_a_resumed_run_has_the_guards_memory(tmp_path: Path, corpus: Path) -> None:
    """Its window and counters after a stop are those of a run that did not stop."""
    states = []
    for stops in (["8step"], ["5step", "8step"]):
        folder = tmp_path / f"stops{len(stops)}"
        folder.mkdir()
        config = tiny_config(
            folder, corpus, train__duration="8step", eval__every=None, checkpoint__every=None
        )
        for stop in stops:
            assert main(["train", str(config), f"train.stop_after={stop}"]) == 0
        saved = folder / "runs" / "tiny" / "checkpoints" / "step-00000008" / "extra.json"
        states.append(json.loads(saved.read_text())["guard"])
    straight, resumed = states
    assert len(straight["losses"]) == len(straight["norms"]) == 8
    assert resumed == straight
