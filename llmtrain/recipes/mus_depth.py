"""The share tau of a residual branch against depth (Narayan et al. 2025, 2502.05967, A.3)."""

from __future__ import annotations

from typing import Any

from llmtrain.recipes.experiment import Experiment, Trial, byte_corpus
from llmtrain.recipes.mus_transfer import DECAY, MUS, shape, short_run
from llmtrain.recipes.sweep import Expectation, Point, Sweep

# (depths, values of tau, width).
GRIDS: dict[str, tuple[tuple[int, ...], tuple[float, ...], int]] = {
    "mini": ((2, 4, 8, 16), (0.00625, 0.0125, 0.025, 0.05, 0.1, 0.2), 32),
    "small": ((4, 8, 16, 32), (0.05, 0.1, 0.2, 0.4, 0.8), 512),
    "paper": ((20, 40, 60, 80, 100), (0.05, 0.1, 0.2, 0.4, 0.8), 1024),
}


def points(scale: str) -> list[Point]:
    """Every depth at every tau."""
    depths, taus, _ = GRIDS[scale]
    return [Point(MUS, depth, tau) for depth in depths for tau in taus]


def _run(scale: str, point: Point) -> dict[str, Any]:
    width, mini = GRIDS[scale][2], scale == "mini"
    model = shape(MUS, width, point.size, 16 if mini else 128)
    model["scaling"] |= {"tau": point.value, "base_width": width}
    optim = {"name": "lion", "weight_decay": DECAY[scale], "decoupled": "fully"}
    if mini:
        return short_run(60, model, {**optim, "lr": 2.0**-4})
    return {
        "model": model | {"vocab_size": 100352},
        "data": {
            "sources": {"text": {"path": "data/text"}},
            "seq_len": 4096,
            "weights": {"text": 1.0},
        },
        "optim": {**optim, "lr": 2.0**-9},
        "schedule": {"name": "cosine", "warmup": "0.02dur", "min_factor": 0.1},
        "train": {
            "duration": "10.5Btok" if scale == "paper" else "1Btok",
            "global_batch_size": 256,
            "micro_batch_size": 1,
        },
        "checkpoint": {"every": "1000step"},
    }


SWEEP = Sweep(
    knob="tau",
    size="depth",
    points=points,
    expects={
        MUS: Expectation("the best tau falls with depth, by one step or more", False, 1, -0.43)
    },
)
EXPERIMENT = Experiment(
    name="mus-depth",
    title="The best share tau of a branch over depth",
    paper=(
        "Narayan et al. 2025, figures 5 and 9: tau 0.4 at 4 layers and 0.1 at what we take to be "
        "100; over depths 20 to 100 the best tau falls and does not depend on width.",
        "The slope -0.43 is our power law through these two values, not the paper's.",
    ),
    trials=lambda scale: [Trial(p.label, _run(scale, p)) for p in points(scale)],
    claims=(),
    baseline=points("mini")[0].label,
    seeds=1,
    corpus=byte_corpus,
    sweep=SWEEP,
)
