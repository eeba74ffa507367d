"""Scaling laws for precision (Kumar et al. 2024, 2411.04330): a grid over N, D and bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from llmtrain.analysis.precision_laws import FULL, KINDS, fit_precision_law
from llmtrain.config.schema import ModelConfig
from llmtrain.eval.checkpoint import evaluate_checkpoint
from llmtrain.model import complete, param_counts
from llmtrain.recipes.experiment import MINI_SOURCES, Experiment, Trial, byte_corpus, mini_run
from llmtrain.recipes.precision_report import Cell, Grid, Rise, precision_lines, precision_svg
from llmtrain.recipes.results import Losses

# Widths and layers, lengths in steps, bits of one kind at a time, and bits of all kinds together.
# mini: models of 6 to 100 thousand parameters and 31 to 123 thousand tokens.
_SHAPES: Mapping[str, Sequence[tuple[int, int]]] = {
    "mini": ((16, 2), (32, 2), (64, 2)),
    "small": ((512, 10), (768, 16)),
    "paper": ((512, 10), (640, 12), (768, 16), (1024, 18)),
}
_STEPS: Mapping[str, Sequence[int]] = {
    "mini": (60, 120, 240),
    "small": (5722, 22888),
    "paper": (5722, 11444, 22888, 49591, 99182),
}
_BITS: Mapping[str, Sequence[int]] = {
    "mini": (3, 4, 6),
    "small": (3, 4, 6),
    "paper": (3, 5, 8),
}
_TOGETHER: Mapping[str, Sequence[int]] = {"mini": (4,), "small": (4,), "paper": (4,)}
_KEYS = ("weights", "inputs", "kv")
ROUNDED_TO = (3, 4, 5, 6)


class _Point(NamedTuple):
    """A run: width, layers, steps and bits of weights, activations, keys and values."""

    width: int
    layers: int
    steps: int
    bits: tuple[float, float, float]

    @property
    def label(self) -> str:
        low = [f"{k} {b:.0f}" for k, b in zip(("w", "a", "kv"), self.bits, strict=True) if b < FULL]
        return f"{self.width} x {self.layers}, {self.steps} steps, {' '.join(low) or 'full'}"


def _of(kinds: set[int], bits: float) -> tuple[float, float, float]:
    weights, activations, kv = (bits if kind in kinds else FULL for kind in range(3))
    return weights, activations, kv


def _points(scale: str) -> list[_Point]:
    full = (FULL, FULL, FULL)
    choices: list[tuple[float, float, float]] = [full]
    for kind in range(3):
        choices += [_of({kind}, float(b)) for b in _BITS[scale]]
    choices += [_of({0, 1, 2}, float(b)) for b in _TOGETHER[scale]]
    shapes, steps = _SHAPES[scale], _STEPS[scale]

    def wanted(shape: tuple[int, int], length: int, bits: tuple[float, float, float]) -> bool:
        # In miniature sizes and lengths in the middle are run in full precision only.
        ends = shape in (shapes[0], shapes[-1]) and length in (steps[0], steps[-1])
        return scale != "mini" or ends or bits == full

    return [
        _Point(*shape, length, bits)
        for shape in shapes
        for length in steps
        for bits in choices
        if wanted(shape, length, bits)
    ]


def _run(scale: str, point: _Point) -> dict[str, Any]:
    """Forward only, as in the paper: gradients are not rounded."""
    low = {k: f"int{b:.0f}" for k, b in zip(_KEYS, point.bits, strict=True) if b < FULL}
    products = "fake" if {"weights", "inputs"} & set(low) else "none"
    sections: dict[str, Any] = {"quantization": {"format": products, **low}} if low else {}
    width, d_head = point.width, 16 if scale == "mini" else 64
    model = {"d_model": width, "n_layers": point.layers, "n_heads": width // d_head}
    if scale == "mini":
        data = {"seq_len": 64, "block_size": 16, "weights": dict.fromkeys(MINI_SOURCES, 1.0)}
        sections |= {"eval": {"every": None, "samples": 96}, "optim": {"lr": 1.0e-2}}
        train = {"duration": f"{point.steps}step", "global_batch_size": 8}
        return mini_run(point.steps, data=data, model=model, train=train, **sections)
    return {
        "model": {**model, "vocab_size": 50304},
        "data": {
            "sources": {"text": {"path": "data/text"}},
            "seq_len": 1024,
            "weights": {"text": 1.0},
        },
        "optim": {"lr": 6.0e-4, "betas": [0.9, 0.95], "eps": 1.0e-15, "weight_decay": 0.1},
        "schedule": {"name": "cosine", "warmup": "0.1dur", "min_factor": 0.1},
        "train": {
            "duration": f"{point.steps}step",
            "global_batch_size": 256,
            "micro_batch_size": 16,
        },
        "checkpoint": {"every": None},
        **sections,
    }


def _size(point: _Point) -> tuple[float, float]:
    """Parameters of the blocks' matrices, and tokens, of a miniature."""
    config = _run("mini", point)
    length = config["data"]["seq_len"]
    model = complete(ModelConfig(**config["model"]), 257, length)
    tokens = point.steps * config["train"]["global_batch_size"] * length
    return float(param_counts(model)["hidden"]), float(tokens)


def _study(losses: Losses, made: Mapping[str, Sequence[Path]]) -> tuple[list[str], str, Any]:
    """The result of the miniature: its grid, and the full-precision runs rounded afterwards."""
    cells, rises = [], []
    for point in _points("mini"):
        n, d = _size(point)
        loss = mean(mean(seed.values()) for seed in losses[point.label])
        cells.append(Cell(n, d, point.bits, loss))
        if point.bits != (FULL,) * 3:
            continue
        for bits in ROUNDED_TO:
            found = [_rounded(folder, bits) for folder in made[point.label]]
            rises.append(Rise(n, d, bits, mean(found) - loss))
    grid = Grid(cells, rises)
    data = {"cells": [c._asdict() for c in cells], "rises": [r._asdict() for r in rises]}
    law = fit_precision_law(cells)
    drawing = precision_svg(grid, law, EXPERIMENT.title)
    return precision_lines(grid, law, EXPERIMENT), drawing, data


def _rounded(folder: Path, bits: int) -> float:
    """Held-out loss of a finished run whose hidden weights are rounded to ``bits``."""
    changes = ["quantization.format=fake", f"quantization.weights=int{bits}"]
    domains = evaluate_checkpoint(folder, changes, "cpu").domains
    return mean(domain["loss"] for domain in domains.values())


EXPERIMENT = Experiment(
    name="precision-scaling-laws",
    title="Few bits count as fewer parameters, and long training makes rounding dear",
    paper=(
        "Kumar et al. 2024 (30M to 220M parameters, 1.5B to 26B tokens, 3 to 12 bits):",
        "  N_eff = N prod(1 - exp(-P/g)) explains held-out runs with R2 0.82; rounding after "
        "training costs C D^0.51 / N^0.34 exp(-P/0.59), rounded by GPTQ;",
        "  weights lose most by few bits, keys and values least; the best precision of all is 7 to "
        "8 bits, whatever the compute",
    ),
    trials=lambda scale: [Trial(p.label, _run(scale, p)) for p in _points(scale)],
    claims=(),
    baseline=_points("mini")[0].label,
    seeds=1,
    corpus=byte_corpus,
    study=_study,
)
assert KINDS == ("weights", "activations", "kv")  # the order of _KEYS
