"""LOST: low-rank and sparse pretraining from the SVD of the initial weights (2508.02668)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmtrain.model import param_counts
from llmtrain.recipes.experiment import (
    MINI_SOURCES,
    Claim,
    Experiment,
    Trial,
    byte_corpus,
    mini_run,
    text_run,
)
from llmtrain.recipes.shape import shape_of
from llmtrain.sparsity import mean_density
from llmtrain.train.console import table

DENSE, LOST, RANDOM, BESIDE = "dense", "lost", "random mask", "random mask + low rank"
# Low rank and columns together keep about as many weights as the random mask alone.
DENSITY, MASK = 0.1, 0.3


def _trials(scale: str) -> list[Trial]:
    return [Trial(label, _run(scale, label)) for label in (DENSE, LOST, RANDOM, BESIDE)]


def _run(scale: str, label: str) -> dict[str, Any]:
    width, depth, heads, ff = {
        "mini": (64, 2, 4, 168),
        "small": (512, 8, 8, 1376),
        "paper": (2048, 24, 32, 5461),
    }[scale]
    rank = width // 8
    shape: dict[str, Any] = {"d_model": width, "n_layers": depth, "n_heads": heads, "d_ff": ff}
    if label in (LOST, BESIDE):
        shape["adapters"] = {"rank": rank, "alpha": float(rank), "freeze": False}
    sparse: dict[str, dict[str, Any]] = {
        LOST: {"method": "lost", "density": DENSITY},
        RANDOM: {"density": MASK},
        BESIDE: {"density": DENSITY},
    }
    sections = {"sparsity": sparse[label]} if label in sparse else {}
    if scale == "mini":
        return mini_run(
            600,
            model={**shape, "tie_embeddings": True},
            data={
                "seq_len": 64,
                "block_size": 16,
                "weights": dict.fromkeys(MINI_SOURCES, 1.0),
            },
            train={"duration": "600step", "global_batch_size": 8},
            eval={"every": None, "samples": 64},
            **sections,
        )
    steps = 10000 if scale == "small" else 100000
    model, optim = {**shape, "vocab_size": 32000}, {"lr": 1.0e-3}
    return text_run(model, 256, steps, (512, 32), "data/c4", optim=optim, **sections)


def costs(folders: Mapping[str, Sequence[Path]]) -> list[str]:
    """Kept weights of the hidden layers and of adapters."""
    rows = [("weights that learn", "hidden layers", "low-rank parts", "of dense")]
    for label, seeds in folders.items():
        cfg, model = shape_of(seeds[0])
        density = 1.0 if cfg.sparsity is None else mean_density(model, cfg.sparsity)
        hidden, low = param_counts(model)["hidden"], 0
        if model.adapters is not None:
            assert model.d_ff is not None
            d, ff = model.d_model, model.d_ff
            low = model.n_layers * model.adapters.rank * (4 * 2 * d + 3 * (d + ff))
        kept = round(density * hidden)
        rows.append((label, f"{kept:,}", f"{low:,}", f"{(kept + low) / hidden:.2f}"))
    return table(rows)


EXPERIMENT = Experiment(
    name="lost",
    title="Low-rank and column-sparse weights from the SVD of the initial ones",
    paper=(
        "LOST (2508.02668): LLaMA models of 60M to 7B on C4 match or beat full-rank ones with less "
        "memory; no table of the paper was at hand.",
    ),
    trials=_trials,
    claims=(
        Claim("lost is within 2% of dense", LOST, DENSE, within=0.02),
        Claim("lost beats a random mask of as many weights", LOST, RANDOM),
        Claim("the SVD's parts beat random ones of the same sizes", LOST, BESIDE),
    ),
    baseline=DENSE,
    costs=costs,
    corpus=byte_corpus,
)
