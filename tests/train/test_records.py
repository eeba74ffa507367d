"""What a run prints and records."""

import json
from pathlib import Path

import pytest

from llmtrain.config.schema import RunConfig, TrainConfig, dur
from llmtrain.train.clockwork import Clockwork
from llmtrain.train.console import clock, gib, human, step_line, table
from llmtrain.train.metrics import JsonlLogger, TensorBoardLogger, read_records, scalars

STEP = {
    "kind": "step",
    "step": 40,
    "tokens": 1_234_567,
    "samples": 4823,
    "loss": 3.21,
    "grad_norm": 0.5,
    "lr": 1e-3,
    "tokens_per_second": 5123.0,
    "mfu": None,
    "memory_bytes": 3 * 2**29,
    "seconds": 1.0,
    "data_seconds": 0.0,
    "sources": {"code": {"tokens": 10, "loss": None, "epochs": 0.1}},
}


def test_step_line_has_every_figure_and_no_guess_for_mfu() -> None:
    line = step_line(STEP, 100, 3723.4)
    for part in ("step  40/100", "1.23M", "3.2100", "0.500", "1.00e-03", "5.12k tok/s"):
        assert part in line
    assert "MFU n/a" in line
    assert "1.50GiB" in line
    assert "ETA 1:02:03" in line
    assert "MFU 41.2%" in step_line({**STEP, "mfu": 0.4123}, 100, None)


@pytest.mark.parametrize(
    ("number", "text"), [(999, "999"), (1000, "1k"), (2.5e9, "2.5B"), (7e13, "70T"), (0.25, "0.25")]
)
def test_human(number: float, text: str) -> None:
    assert human(number) == text


def test_small_formatters() -> None:
    assert clock(None) == "-"
    assert gib(5 * 2**20) == "5MiB"
    assert table([("a", "b"), ("ccc", "1")]) == ["  a    b", "  ccc  1"]


def test_jsonl_drops_what_will_be_done_again_and_half_a_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = JsonlLogger(path, 0)
    for step in (1, 2, 3):
        first.write({"kind": "step", "step": step, "loss": float(step)})
    first.close()
    with path.open("a") as file:
        file.write('{"kind": "step", "st')
    second = JsonlLogger(path, 2)
    second.write({"kind": "step", "step": 3, "loss": float("nan")})
    second.close()
    assert [r["step"] for r in read_records(path)] == [1, 2, 3]
    assert json.loads(path.read_text().splitlines()[-1])["loss"] == "nan"


def test_scalars_name_what_the_plotting_services_get() -> None:
    flat = scalars(STEP)
    assert flat["train/loss"] == 3.21
    assert flat["source/code/tokens"] == 10.0
    assert "train/mfu" not in flat
    assert "source/code/loss" not in flat
    evaluation = {
        "kind": "eval",
        "step": 1,
        "tokens": 1,
        "domains": {"code": {"loss": 2.0, "perplexity": 7.4, "tokens": 5}},
        "mean_loss": 2.0,
    }
    assert scalars(evaluation) == {
        "eval/code/loss": 2.0,
        "eval/code/perplexity": 7.4,
        "eval/mean_loss": 2.0,
    }


def test_tensorboard_files_hold_the_scalars(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path, 0)
    logger.write(STEP)
    logger.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    (point,) = events.Scalars("train/loss")
    assert point.value == pytest.approx(3.21)
    assert point.step == 1_234_567


def test_clockwork_resolves_durations_and_always_evaluates_at_the_end() -> None:
    cfg = RunConfig(train=TrainConfig(duration=dur("100step"), stop_after=dur("0.5dur")))
    times = Clockwork.from_config(cfg)
    assert (times.total, times.stop, times.eval_every, times.save_every) == (100, 50, 25, 50)
    assert [s for s in range(1, 51) if times.evaluates(s)] == [25, 50]
    by_tokens = RunConfig(train=TrainConfig(duration=dur("100Ktok"), global_batch_size=4))
    assert Clockwork.from_config(by_tokens).total == 98  # 1,024 tokens a step, rounded up
