"""Transfer of the learning rate over width with unit scaling (Narayan et al. 2025, 2502.05967)."""

from __future__ import annotations

from typing import Any

from llmtrain.recipes.experiment import MINI_SOURCES, Experiment, Trial, byte_corpus, mini_run
from llmtrain.recipes.sweep import Expectation, Point, Sweep

MUS, STANDARD = "mus", "standard"
# (widths, powers of two of the learning rate for each kind).
GRIDS: dict[str, tuple[tuple[int, ...], dict[str, range]]] = {
    "mini": ((16, 32, 64, 128), {MUS: range(-6, 0), STANDARD: range(-11, -4)}),
    "small": ((256, 512, 1024, 2048), {MUS: range(-12, -5), STANDARD: range(-15, -7)}),
    "paper": (
        (256, 512, 1024, 2048, 4096, 8192),
        {MUS: range(-12, -5), STANDARD: range(-17, -8)},
    ),
}
DECAY = {"mini": 2.0**-10, "small": 2.0**-13, "paper": 2.0**-13}


# Beside the learning rates, at the scales that make jobs: powers of two of the weight decay, at one
# rate a width (standard: by the paper's rule for it). Too short for a miniature, where a decay that
# matters in a run of 60 steps would be none that anybody uses.
DECAYS = range(-16, -9)
DECAY_RATES = {MUS: 2.0**-9, STANDARD: 2.0**-11}


def points(scale: str) -> list[Point]:
    """Every width at every learning rate of its kind, and at every decay of ``DECAYS``."""
    widths, powers = GRIDS[scale]
    found = [Point(k, w, 2.0**p) for k in powers for w in widths for p in powers[k]]
    if scale != "mini":
        found += [Point(_decay(k), w, 2.0**p) for k in powers for w in widths for p in DECAYS]
    return found


def _decay(kind: str) -> str:
    return f"{kind} decay"


def shape(kind: str, width: int, layers: int, d_head: int) -> dict[str, Any]:
    """The model section: GELU, LayerNorm and rotary positions in both; muS with norms at the end
    of branches and a fixed residual, standard with norms before them."""
    model: dict[str, Any] = {
        "d_model": width,
        "n_layers": layers,
        "n_heads": width // d_head,
        "d_ff": 4 * width,
        "norm": "layernorm",
        "activation": "gelu",
    }
    if kind == MUS:
        model["norm_placement"] = "post_branch"
        model["scaling"] = {"parametrization": "mus", "base_width": 256, "tau": 0.4}
    return model


def short_run(steps: int, model: dict[str, Any], optim: dict[str, Any]) -> dict[str, Any]:
    """A run of a few seconds: 512 bytes a step."""
    data = {"seq_len": 64, "block_size": 16, "weights": dict.fromkeys(MINI_SOURCES, 1.0)}
    changes = {"eval": {"every": None, "samples": 64}, "model": model, "optim": optim}
    changes["train"] = {"duration": f"{steps}step", "global_batch_size": 8}
    return mini_run(steps, data=data, **changes)


def _run(scale: str, point: Point) -> dict[str, Any]:
    mini = scale == "mini"
    kind, _, decays = point.kind.partition(" ")
    rate, decay = point.value, DECAY[scale]
    if decays:
        transfer = 256 / point.size if kind == STANDARD else 1.0
        rate, decay = DECAY_RATES[kind] * transfer, point.value
    optim = {"name": "lion", "lr": rate, "weight_decay": decay, "decoupled": "fully"}
    # A rate that is too high shall end with a bad loss, not end the sweep.
    guard = {"nonfinite": "skip", "max_skips": 1_000_000, "spike": "ignore"}
    if mini:
        model = shape(kind, point.size, 2, 16)
        if kind == MUS:
            model["scaling"]["base_width"] = 16
        return short_run(60, model, optim) | {"guard": guard}
    model = shape(kind, point.size, 4, 128) | {"vocab_size": 100352}
    return {
        "model": model,
        "data": {
            "sources": {"text": {"path": "data/text"}},
            "seq_len": 1024,
            "weights": {"text": 1.0},
        },
        "optim": optim,
        "guard": guard,
        "schedule": {"name": "cosine", "warmup": "0.02dur", "min_factor": 0.1},
        "train": {"duration": "10000step", "global_batch_size": 64, "micro_batch_size": 8},
        "checkpoint": {"every": None},
    }


SWEEP = Sweep(
    knob="learning rate",
    size="width",
    points=points,
    expects={
        MUS: Expectation(
            "mus: the best learning rate of all widths within one step of 2", True, 1, 0.0
        ),
        STANDARD: Expectation(
            "standard: the best learning rate falls with width, by two steps or more", False, 2, -1
        ),
    },
)
EXPERIMENT = Experiment(
    name="mus-transfer",
    title="The best learning rate over an 8-fold range of widths",
    paper=(
        "Narayan et al. 2025 (4 layers, widths 256 to 8192, 10,000 steps of 64 x 1024 tokens, "
        "Lion, tau 0.4):",
        "  mus: the best learning rate and weight decay are the same at all widths; standard: the "
        "rate falls about as 1/width, the decay hardly moves",
    ),
    trials=lambda scale: [Trial(p.label, _run(scale, p)) for p in points(scale)],
    claims=(),
    baseline=points("mini")[0].label,
    seeds=1,
    corpus=byte_corpus,
    sweep=SWEEP,
)
