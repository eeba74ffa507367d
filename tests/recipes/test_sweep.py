"""Optima of sweeps and how they move, from planted curves; the configs of unit scaling's table."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import pytest

from llmtrain.config import load_config
from llmtrain.model import param_counts, resolve_model
from llmtrain.recipes import mus_depth, mus_transfer
from llmtrain.recipes.experiment import Experiment, Trial
from llmtrain.recipes.runner import _result
from llmtrain.recipes.sweep import (
    Expectation,
    Losses,
    Point,
    Sweep,
    movements,
    optimum,
    sweep_verdict,
)

GRID = [2.0**k for k in range(-8, 0)]
SIZES = (16, 32, 64, 128)
RECIPES = Path(__file__).parents[2] / "configs" / "recipes"


def _points(scale: str) -> list[Point]:
    return [Point(kind, n, v) for kind in ("flat", "falling") for n in SIZES for v in GRID]


SWEEP = Sweep(
    "rate",
    "width",
    _points,
    {
        "flat": Expectation("flat stays", True, 1, 0.0),
        "falling": Expectation("falling falls", False, 2, -1.0),
    },
)


def _curves(flat: dict[int, float], falling: dict[int, float]) -> Losses:
    """Parabolas in log2 of the value with their minima where they are told; two seeds and two
    domains, whose mean is the parabola."""
    losses: Losses = {}
    for point in _points("mini"):
        place = (flat if point.kind == "flat" else falling)[point.size]
        value = 2.0 + 0.1 * (math.log2(point.value) - place) ** 2
        losses[point.label] = [{"a": value + s, "b": value - 3 * s} for s in (0.1, -0.1)]
        losses[point.label] = [{k: v + 0.1 * (s - 0.5) for k, v in d.items()} for s, d in
                               enumerate(losses[point.label])]  # fmt: skip
    return losses


FLAT = {16: -4.2, 32: -4.4, 64: -4.6, 128: -4.1}
LAW = {n: -2.4 - math.log2(n / 16) for n in SIZES}


def test_the_parabola_finds_the_minimum_between_values() -> None:
    curve = [0.3 * (math.log2(v) + 4.3) ** 2 for v in GRID]
    found = optimum(64, GRID, curve)
    assert (found.value, found.place, found.edge) == (2.0**-4, 4, False)
    assert found.exact == pytest.approx(3.7)
    assert optimum(64, GRID, [float(k) for k in range(8)]).edge
    broken = [math.nan, 3.0, 2.0, math.inf]
    assert optimum(64, GRID[:4], broken).value == GRID[2]


def test_movements_of_planted_optima() -> None:
    flat, falling = movements(SWEEP, _curves(FLAT, LAW), "mini")
    assert falling.slope == pytest.approx(-1, abs=1e-6) and falling.word == "holds"
    assert abs(flat.slope) < 0.1 and flat.word == "holds"
    assert sweep_verdict([flat, falling]) == "direction holds at this scale"
    swapped = movements(SWEEP, _curves(LAW, FLAT), "mini")
    assert [m.word for m in swapped] == ["does not hold"] * 2
    assert "flat stays: does not hold; falling falls" in sweep_verdict(swapped)


def test_an_optimum_at_the_end_of_the_grid_tells_nothing_of_staying() -> None:
    beyond = dict.fromkeys(SIZES, 0.5)
    flat, _ = movements(SWEEP, _curves(beyond, LAW), "mini")
    assert flat.word.startswith("cannot be told")


def test_result_of_a_sweep_is_a_table_a_verdict_and_a_drawing() -> None:
    trials = [Trial(p.label) for p in _points("mini")]
    experiment = Experiment(
        "s", "A & B", ["paper: 1"], lambda scale: trials, (), trials[0].label, sweep=SWEEP
    )
    lines, drawing = _result(experiment, _curves(FLAT, LAW), ())
    text = "\n".join(lines)
    assert "verdict: direction holds" in text and "paper: 1" in text and "-1.00" in text
    assert drawing.count("<polyline") == 8 and "A &amp; B" in drawing


@pytest.mark.parametrize("module", [mus_transfer, mus_depth])
@pytest.mark.parametrize("scale", ["mini", "small", "paper"])
def test_grids_have_equal_factors_and_labels_of_their_own(module: object, scale: str) -> None:
    experiment: Experiment = module.EXPERIMENT  # type: ignore[attr-defined]
    assert experiment.sweep is not None
    points = experiment.sweep.points(scale)
    assert len({p.label for p in points}) == len(points)
    assert [t.label for t in experiment.trials(scale)] == [p.label for p in points]
    for kind in experiment.sweep.expects:
        grid = sorted({p.value for p in points if p.kind == kind})
        assert all(b / a == pytest.approx(2) for a, b in pairwise(grid))


def test_decays_are_swept_at_the_rate_of_the_papers_rule() -> None:
    runs = {t.label: t.config["optim"] for t in mus_transfer.EXPERIMENT.trials("paper")}
    at = 2.0**-13
    wide, narrow = (runs[Point("standard decay", w, at).label] for w in (1024, 256))
    assert narrow["lr"] == 4 * wide["lr"] and wide["weight_decay"] == at
    assert runs[Point("mus decay", 8192, at).label]["lr"] == mus_transfer.DECAY_RATES["mus"]
    assert not any("decay" in p.kind for p in mus_transfer.points("mini"))


@pytest.mark.parametrize(
    ("name", "params", "tokens"),
    [
        ("unit-scaling", 1.6, 31.5),
        ("unit-scaling-3b", 3.0, 62.9),
        ("unit-scaling-7b", 7.3, 140.0),
        ("unit-scaling-13b", 13.6, 260.1),
    ],
)
def test_the_papers_models(name: str, params: float, tokens: float) -> None:
    """Sizes and tokens of table 4 in billions."""
    cfg = load_config(RECIPES / f"{name}.yaml", for_training=True)
    model = resolve_model(cfg, None)
    assert param_counts(model)["total"] / 1e9 == pytest.approx(params, abs=0.05)
    steps = cfg.train.duration.steps(1)
    read = steps * cfg.train.global_batch_size * cfg.data.seq_len
    assert read / 1e9 == pytest.approx(tokens, abs=0.1)
    assert model.d_model // model.n_heads == 128 and model.d_ff == 4 * model.d_model
