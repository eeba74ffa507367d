"""Setting the planner's one free factor by a run that was measured."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

from llmtrain.errors import ConfigError
from llmtrain.planner.forecast import Forecaster
from llmtrain.planner.machine import Machine
from llmtrain.planner.timing import step_time

# The first lines of a run are slow: compiling, cold caches.
_COLD = 2
_LOW, _HIGH = 0.05, 20.0


def measured_rate(file: Path) -> float:
    """Median tokens/s of a run's ``metrics.jsonl``, its first log lines apart.

    Raises ConfigError naming the file where it holds no logged steps.
    """
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise ConfigError(f"--calibrate {file}: {error.strerror}; name a metrics.jsonl") from error
    rates: list[Any] = []
    for line in lines:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue  # the last line of a run that was killed
        if isinstance(record, dict) and record.get("kind") == "step":
            rates.append(record.get("tokens_per_second"))
    usable = [rate for rate in rates[_COLD:] or rates if isinstance(rate, int | float)]
    good = [float(rate) for rate in usable if 0 < rate < math.inf]
    if not good:
        raise ConfigError(f"--calibrate {file}: holds no logged steps; name a run's metrics.jsonl")
    return statistics.median(good)


def calibrated(forecaster: Forecaster, world: int, rate: float) -> Machine:
    """The machine with ``factor`` such that the run that was measured is forecast exactly.

    forecaster: of that run, on ``world`` GPUs. rate: its tokens/s. Raises ConfigError where no
    factor between 1/20 and 20 does it.
    """
    cfg, machine = forecaster.cfg, forecaster.machine
    if world < 1:
        raise ConfigError(f"--calibrate-gpus {world}: the measured run had 1 GPU or more")
    setting = forecaster.setting(cfg, world)
    blueprint = forecaster.blueprint(setting)
    wanted = cfg.train.global_batch_size * cfg.data.seq_len / rate

    def with_factor(factor: float) -> Machine:
        return replace(machine, reached=replace(machine.reached, factor=factor))

    low, high = _LOW, _HIGH
    if not (
        step_time(setting, blueprint, with_factor(low)).total
        <= wanted
        <= step_time(setting, blueprint, with_factor(high)).total
    ):
        raise ConfigError(
            f"--calibrate: {rate:.4g} tokens/s on {world} {machine.name} is not within a factor of "
            f"{_HIGH:g} of the forecast; check --gpu and --calibrate-gpus"
        )
    for _ in range(50):
        middle = (low * high) ** 0.5
        if step_time(setting, blueprint, with_factor(middle)).total < wanted:
            low = middle
        else:
            high = middle
    return with_factor((low * high) ** 0.5)
