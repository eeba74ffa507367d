"""The planner's times against published runs and closed forms; search and calibration."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.steps import setting_of, small_run

from llmtrain.cli.main import main
from llmtrain.config import RunConfig
from llmtrain.errors import ConfigError
from llmtrain.model import complete
from llmtrain.planner.calibrate import calibrated, measured_rate
from llmtrain.planner.communication import ALL_GATHER, SEND, Traffic
from llmtrain.planner.forecast import Forecaster
from llmtrain.planner.machine import MACHINES, machine_named
from llmtrain.planner.search import binding, candidates, search, simpler
from llmtrain.planner.timing import _seconds, product_seconds, step_time
from llmtrain.train.throughput import peak_flops

PUBLISHED = json.loads((Path(__file__).parent / "data" / "megatron.json").read_text("utf-8"))
H100 = MACHINES["h100"]
SMALL: dict[str, Any] = {
    "model__d_model": 256,
    "model__n_layers": 8,
    "model__n_heads": 8,
    "model__d_ff": 704,
    "model__vocab_size": 2048,
    "data__seq_len": 512,
    "train__global_batch_size": 64,
    "precision__compute": "auto",
}


def published_run(row: list[float]) -> RunConfig:
    """The config of a row, with what is not published as the data file says."""
    _, heads, hidden, layers, tensor, pipeline, gpus, batch = (int(x) for x in row[:8])
    changes: dict[str, Any] = {
        "model__d_model": hidden,
        "model__n_layers": layers,
        "model__n_heads": heads,
        "model__d_ff": 4 * hidden,
        "model__vocab_size": 131072,
        "model__activation": "gelu",
        "model__position": "learned",
        "model__tie_embeddings": True,
        "data__seq_len": 4096,
        "precision__compute": "auto",
        "train__global_batch_size": batch,
        "train__micro_batch_size": 1 if pipeline > 1 else batch * tensor // gpus,
        "parallel__tensor": tensor,
        "parallel__pipeline": pipeline,
        "parallel__reshard_after_forward": False,
    }
    if pipeline > 1:
        changes |= {
            "parallel__pipeline_schedule": "interleaved",
            "parallel__pipeline_stages": layers // pipeline,
        }
    return small_run(**changes)


def published_rate(row: list[float]) -> float:
    """Tokens/s from the row's aggregate FLOP/s and the formula of the README's source."""
    hidden, layers = row[2], row[3]
    per_token = 72 * layers * hidden**2
    per_token *= 1 + 4096 / (6 * hidden) + 131072 / (12 * layers * hidden)
    return row[8] * 1e15 / per_token


def forecaster_of(cfg: RunConfig, machine: Any = H100) -> Forecaster:
    return Forecaster(cfg, complete(cfg.model, None, cfg.data.seq_len), machine)


def test_published_h100_runs_after_calibrating_on_one_row() -> None:
    """Megatron 1.7B to 462B and the strong scaling of 177B: 16 rows, of which one is fitted."""
    rows = PUBLISHED["weak"] + PUBLISHED["strong"]
    fitted = PUBLISHED["weak"][6]
    cfg = published_run(fitted)
    machine = calibrated(forecaster_of(cfg), int(fitted[6]), published_rate(fitted))
    assert machine.reached.factor == pytest.approx(1, abs=0.1)
    errors, drawn = {}, {}
    for row in rows:
        cfg, gpus = published_run(row), int(row[6])
        forecaster = drawn.setdefault((row[0], row[4]), forecaster_of(cfg, machine))
        setting = forecaster.setting(cfg, gpus)
        seconds = step_time(setting, forecaster.blueprint(setting), machine).total
        rate = row[7] * 4096 / seconds
        errors[row[0], gpus] = abs(rate / published_rate(row) - 1)
    assert errors[fitted[0], fitted[6]] < 1e-6
    assert statistics.median(errors.values()) < 0.15
    assert max(errors.values()) < 0.30
    # The slope of the strong scaling, which one constant for all rows would not give.
    strong = [errors[177, gpus] for gpus in (96, 1152, 4608)]
    assert max(strong) < 0.06


@pytest.mark.parametrize("name", MACHINES)
def test_peaks_are_those_that_mfu_is_measured_by(name: str) -> None:
    assert MACHINES[name].peak == peak_flops(name)


def test_a_product_that_fills_its_waves_reaches_what_it_can() -> None:
    rows = 128 * 132
    seconds = product_seconds(rows, 8192, 256 * 8, H100)
    flops = 2 * rows * 8192 * 2048
    expected = flops / (989.4e12 * 0.68) * (8192 + 256) / 8192
    assert seconds == pytest.approx(expected)
    # One more row of tiles needs one more wave.
    more = product_seconds(rows + 1, 8192, 256 * 8, H100)
    assert more == pytest.approx(expected * 9 / 8)
    # A thin product is bound by reading its matrix.
    thin = product_seconds(1, 8192, 8192, H100)
    assert thin == pytest.approx(2 * (8192 + 8192 * 8192 + 8192) / (3.35e12 * 0.8))


def test_slow_links_are_those_between_nodes() -> None:
    inside = setting_of(small_run(parallel__tensor=4), 16)
    gather = Traffic("blocks", ALL_GATHER, "tensor", 4, 1, 1 << 30)
    sent = (1 << 30) * 3 / 4
    assert _seconds(gather, inside, H100) == pytest.approx(8e-6 + sent / (450e9 * 0.8))
    # Of 16 shards beside 4 tensor ranks a node holds 2, which share two of its cards.
    across = setting_of(small_run(parallel__tensor=4, train__global_batch_size=16), 64)
    shards = Traffic("parameters", ALL_GATHER, "shard", 16, 1, 1 << 30)
    seconds = 8e-6 + 3 * 12e-6 + (1 << 30) * 15 / 16 / (2 * 50e9 * 0.8)
    assert _seconds(shards, across, H100) == pytest.approx(seconds)
    stages = setting_of(small_run(parallel__pipeline=2, train__micro_batch_size=1), 16)
    message = Traffic("stages", SEND, "pipeline", 2, 1, 1 << 20)
    assert _seconds(message, stages, H100) == pytest.approx(20e-6 + (1 << 20) / (50e9 * 0.8))


def test_the_bubble_is_that_of_the_papers() -> None:
    def bubble(schedule: str, stages: int | None) -> float:
        run = small_run(
            **SMALL,
            parallel__pipeline=4,
            parallel__pipeline_schedule=schedule,
            parallel__pipeline_stages=stages,
            train__micro_batch_size=4,
        )
        forecaster = forecaster_of(run)
        setting = forecaster.setting(run, 4)
        parts = step_time(setting, forecaster.blueprint(setting), H100).parts
        return parts["pipeline bubble"] / (parts["pipeline bubble"] + computing(parts))

    def computing(parts: dict[str, float]) -> float:
        names = ("products", "attention", "norms and activations", "head and loss")
        return sum(parts.get(name, 0.0) for name in names)

    # 16 micro-batches, and 3 of waiting.
    assert bubble("1f1b", None) == pytest.approx(3 / 19)
    assert bubble("interleaved", 2) == pytest.approx(1.5 / 17.5)
    assert bubble("zero_bubble", 2) == pytest.approx(0.5 / 16.5)


def test_search_finds_what_trying_everything_finds() -> None:
    cfg = small_run(**SMALL)
    machine = machine_named("h100", node=4, memory_gib=0.06)
    forecaster = forecaster_of(cfg, machine)
    found = search(forecaster, cfg, 8)
    everything = [forecaster.forecast(c, 8) for c in candidates(cfg, 8, forecaster)]
    fitting = [one for one in everything if one.fits]
    assert (found.tried, found.fitting) == (len(everything), len(fitting))
    assert 0 < len(fitting) < len(everything)
    best = found.best[0]
    assert best.time.total == min(one.time.total for one in fitting)
    assert best.memory.peak <= 0.92 * machine.memory
    degrees = {(o.setting.degrees.tensor, o.setting.degrees.pipeline) for o in everything}
    assert {(1, 1), (4, 2), (2, 4)} <= degrees
    assert all(line.split(": ")[1] for line in simpler(forecaster, best, 8))


def test_where_nothing_fits_the_leanest_says_by_how_much() -> None:
    cfg = small_run(**SMALL)
    forecaster = forecaster_of(cfg, machine_named("h100", memory_gib=0.001))
    found = search(forecaster, cfg, 2)
    assert found.best == [] and found.leanest is not None
    assert binding(found.leanest).startswith("memory: ")


def test_a_measured_run_is_forecast_exactly(tmp_path: Path) -> None:
    cfg = small_run(**SMALL)
    file = tmp_path / "metrics.jsonl"
    rates = [3.0, 50.0, 900e3, 1.1e6, 1e6, None, "x", math.inf]
    lines = [json.dumps({"kind": "step", "tokens_per_second": rate}) for rate in rates]
    file.write_bytes("\n".join([*lines, '{"kind": "eval"}', '{"kind": "st']).encode() + b"\xff")
    assert measured_rate(file) == 1e6
    machine = calibrated(forecaster_of(cfg), 4, 1e6)
    assert forecaster_of(cfg, machine).forecast(cfg, 4).tokens_per_second == pytest.approx(1e6)
    with pytest.raises(ConfigError, match="--calibrate-gpus 0: "):
        calibrated(forecaster_of(cfg), 0, 1e6)
    with pytest.raises(ConfigError, match="check --gpu"):
        calibrated(forecaster_of(cfg), 4, 1.0)
    file.write_text("", encoding="utf-8")
    with pytest.raises(ConfigError, match="no logged steps"):
        measured_rate(file)


def test_mfu_days_and_cost_are_those_of_the_rate() -> None:
    cfg = replace(small_run(**SMALL), train=small_run(train__duration="100Mtok").train)
    one = forecaster_of(cfg).forecast(cfg, 8)
    assert one.days * 24 * 3600 * one.tokens_per_second == pytest.approx(one.tokens)
    assert one.cost(2.0) == pytest.approx(2.0 * 8 * 24 * one.days)
    assert one.setting.precision.compute == torch.bfloat16
    assert 0 < one.mfu < 1


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.yaml"
    raw: dict[str, Any] = {}
    for key, value in SMALL.items():
        section, _, name = key.partition("__")
        raw.setdefault(section, {})[name] = value
    file.write_text(yaml.safe_dump(raw), encoding="utf-8")
    plan = ["plan", str(file), "--gpus", "4", "--gpu", "h200"]
    assert main([*plan, "--search", "--price", "3", "--memory", "0.1"]) == 0
    text = capsys.readouterr().out
    for word in ("layouts", "expected: ", "cost: ", "binding: ", "overrides: parallel.tensor="):
        assert word in text
    assert main([*plan, "parallel.tensor=2", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)[0]
    assert facts["fits"] and sum(facts["seconds"].values()) == pytest.approx(facts["step_seconds"])
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"kind": "step", "tokens_per_second": 2e6}\n', encoding="utf-8")
    (tmp_path / "config.yaml").write_text(file.read_text("utf-8"), encoding="utf-8")
    measured = ["--calibrate", str(metrics)]
    assert main([*plan, *measured]) == 2
    assert "--calibrate-gpus" in capsys.readouterr().err
    assert main([*plan, *measured, "--calibrate-gpus", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["tokens_per_second"] == pytest.approx(2e6)
    for option, value in (("--price", "nan"), ("--price", "-1"), ("--network", "nan")):
        assert main([*plan, option, value]) == 2
        assert f"{option}" in capsys.readouterr().err
    assert main([*plan[:-1], "z80"]) == 2
    assert "choose from a100" in capsys.readouterr().err
