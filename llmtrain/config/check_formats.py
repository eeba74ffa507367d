"""Rules of the ``quantization`` and ``numerics`` sections."""

from __future__ import annotations

import math
import re

from llmtrain.config.faults import Collector
from llmtrain.config.schema import RunConfig

_NUMBER = re.compile(r"none|ternary|int(?P<int>\d{1,2})|e(?P<exponent>\d)m(?P<mantissa>\d{1,2})")
NUMBER_HELP = (
    "write none, ternary, int3 to int16, or a float of 3 to 16 bits with at most 6 for the "
    "exponent, such as e4m3 or e2m1"
)
# float32 holds 2^-126 to 2^127; a layer's 1/sqrt(fan_in) is divided by the factor as well.
_MOST_SCALED = 100
OPERANDS = ("weights", "inputs", "gradients", "kv")


def is_number_format(text: str) -> bool:
    """Whether fake quantisation knows ``text``."""
    match = _NUMBER.fullmatch(text)
    if match is None:
        return False
    if match["int"] is not None:
        return 3 <= int(match["int"]) <= 16
    if match["exponent"] is None:
        return True
    exponent, mantissa = int(match["exponent"]), int(match["mantissa"])
    return 1 <= exponent <= 6 and 3 <= 1 + exponent + mantissa <= 16


def check_formats(cfg: RunConfig, faults: Collector) -> None:
    """What no single key of the sections can be blamed for."""
    if cfg.numerics is not None and cfg.train.compile:
        message = "cannot look into compiled blocks; set train.compile to false"
        faults.add("numerics", message, "train.compile")
    section = cfg.quantization
    if section is None:
        return
    used = section.formats
    numbers = {name: getattr(section, name) for name in OPERANDS}
    for name, number in numbers.items():
        where = f"quantization.{name}"
        if not is_number_format(number):
            faults.add(where, f"{number!r} is no number format; {NUMBER_HELP}")
        elif number != "none" and name != "kv" and "fake" not in used:
            message = "is read with format: fake only; take it away, or use that format"
            faults.add(where, message, "quantization.format")
    if "fake" in used and set(numbers.values()) == {"none"}:
        faults.add(
            "quantization.format",
            "fake changes nothing; set quantization.weights, inputs, gradients or kv",
            *(f"quantization.{name}" for name in OPERANDS),
        )
    scale = section.gradient_scale
    if scale is not None and math.frexp(scale)[0] != 0.5:
        message = f"{scale:g} is no power of two, and would be a rounding more; write 65536, say"
        faults.add("quantization.gradient_scale", message)
    elif scale is not None and abs(math.frexp(scale)[1] - 1) > _MOST_SCALED:
        message = f"{scale:g} is beyond 2^-{_MOST_SCALED} to 2^{_MOST_SCALED}: gradients times it, "
        message += "or products over it, are no float32 numbers; write 65536, say"
        faults.add("quantization.gradient_scale", message)
    if used == {"none"} and section.kv == "none":
        faults.add("quantization", "changes nothing; choose a format, or take the section away")
    for i, rule in enumerate(section.rules):
        if not rule.layers:
            message = "is empty; write patterns of layer names, such as blocks.0.*"
            faults.add(f"quantization.rules.{i}.layers", message)
    if "te" in used:
        _check_te(cfg, faults)
    if cfg.parallel.engine == "deepspeed":
        faults.add(
            "quantization",
            "does not work with parallel.engine deepspeed; use the native engine",
            "parallel.engine",
        )


def _check_te(cfg: RunConfig, faults: Collector) -> None:
    """What TransformerEngine's layers are not made to work with here."""
    layout = cfg.parallel
    for name, clear in (
        ("parallel.tensor", layout.tensor == 1),
        ("parallel.pipeline", layout.pipeline == 1),
        ("train.recompute", cfg.train.recompute == "none"),
        ("train.compile", not cfg.train.compile),
        ("model.adapters", cfg.model.adapters is None),
        ("sparsity", cfg.sparsity is None),
    ):
        if not clear:
            message = f"te does not go with {name}; leave that away, or use fp8_current"
            faults.add("quantization.format", message, name)
    if cfg.device == "cpu":
        message = "te runs on NVIDIA GPUs only; on device: cpu use fp8_current, which is emulated"
        faults.add("quantization.format", message, "device")
