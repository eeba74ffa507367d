"""Sparse-IFT: sparse layers at the FLOPs of dense ones (Thangarasa et al. 2023, 2303.11525)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmtrain.config.schema import ModelConfig
from llmtrain.model import flops_per_token, param_counts
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
from llmtrain.train.console import human, table

DENSE = "dense"
WIDE, WIDE_RIGL, WIDER = "wide 50%", "wide 50%, rigl", "wide 75%, rigl"
DOPED, NARROW = "doped 50%", "plain 50%"
PARALLEL, FACTORIZED = "parallel MLP 50%, rigl", "factorized 50%, rigl"


def wide(width: int, sparsity: float, multiple: int) -> int:
    """Width of a Sparse Wide layer of as many kept weights: width sqrt(1 / (1 - s))."""
    return round(width * math.sqrt(1 / (1 - sparsity)) / multiple) * multiple


def parallel(sparsity: float) -> int:
    """Branches of a Sparse Parallel layer of as many kept weights: 1 / (1 - s).

    The sum of MLPs beside each other, sum_j down_j(act(up_j(x))), is one MLP of as many times the
    inner width, so that a branch needs no module of its own.
    """
    return round(1 / (1 - sparsity))


def doped_rank(width: int, sparsity: float) -> int:
    """Rank of the low-rank part of a Sparse Doped layer: s d_in d_out / (d_in + d_out)."""
    return round(sparsity * width / 2)


def _trials(scale: str) -> list[Trial]:
    width, multiple = {"mini": (64, 8), "small": (768, 64), "paper": (1024, 64)}[scale]
    half, quarter = wide(width, 0.5, multiple), wide(width, 0.75, multiple)
    static, rigl = {"density": 0.5}, {"method": "rigl", "density": 0.5, "every": "0.02dur"}
    rank = doped_rank(width, 0.5)
    adapters = {"rank": rank, "alpha": float(rank), "freeze": False}
    factors = {"density_u": 0.5, "density_v": 0.5, "multiple_of": multiple}
    beside = {**rigl, "rules": [{"layers": ["*.attention.*"], "density": 1.0}]}
    found: dict[str, tuple[Any, ...]] = {
        DENSE: (width, None),
        WIDE: (half, static),
        WIDE_RIGL: (half, rigl),
        WIDER: (quarter, {**rigl, "density": 0.25}),
        PARALLEL: (width, beside, {"d_ff": parallel(0.5) * _d_ff(width)}),
        FACTORIZED: (width, rigl, {"factorized": factors}),
        DOPED: (width, static, {"adapters": adapters}),
        NARROW: (width, static),
    }
    return [Trial(label, _run(scale, width, *rest)) for label, (width, *rest) in found.items()]


def _d_ff(width: int) -> int:
    return 8 * round(width / 3)


def _run(
    scale: str, width: int, sparsity: Any, more: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Attention heads, depth, data, steps and learning rate are the same for all widths. more: of
    the model's section."""
    shape: dict[str, Any] = {"d_model": width, "n_heads": 4, "tie_embeddings": True}
    shape |= {"d_ff": _d_ff(width), **(more or {})}
    sections = {} if sparsity is None else {"sparsity": sparsity}
    if scale == "mini":
        data = {"seq_len": 64, "block_size": 16, "weights": dict.fromkeys(MINI_SOURCES, 1.0)}
        return mini_run(
            400,
            model={**shape, "n_layers": 2},
            data=data,
            train={"duration": "400step", "global_batch_size": 8},
            eval={"every": None, "samples": 64},
            **sections,
        )
    depth, steps = (12, 10000) if scale == "small" else (24, 30000)
    model = {**shape, "vocab_size": 50257, "n_layers": depth, "n_heads": 16}
    return text_run(model, 1024, steps, (256, 8), **sections)


def costs(folders: Mapping[str, Sequence[Path]]) -> list[str]:
    """Parameters stored and kept in hidden layers, and counted FLOPs of a token."""
    rows = [("", "hidden weights", "kept, with adapters", "FLOPs per token")]
    for label, seeds in folders.items():
        cfg, model = shape_of(seeds[0])
        density = 1.0 if cfg.sparsity is None else mean_density(model, cfg.sparsity)
        hidden = param_counts(model)["hidden"]
        beside = _adapter_weights(model)
        flops = flops_per_token(model, cfg.data.seq_len, density) + 6.0 * beside
        rows.append((label, f"{hidden:,}", f"{density * hidden + beside:,.0f}", human(flops)))
    return table(rows)


def _adapter_weights(model: ModelConfig) -> int:
    """Weights of all adapters: rank (inputs + outputs) of every matrix."""
    if model.adapters is None:
        return 0
    assert model.d_ff is not None
    d, ff = model.d_model, model.d_ff
    return model.n_layers * model.adapters.rank * (4 * (d + d) + 3 * (d + ff))


EXPERIMENT = Experiment(
    name="sparse-ift",
    title="Sparse layers at the FLOPs of dense ones: wider, parallel, factorized, doped",
    paper=(
        "Sparse-IFT (2303.11525): GPT-3 Small on WikiText-103 gains 0.4 of perplexity at equal "
        "FLOPs; ResNet-18 on ImageNet 3.5 points; dynamic masks (RigL) beat static ones.",
        "Here Sparse Parallel is that of the MLP, Sparse Factorized has GELU between its factors.",
    ),
    trials=_trials,
    claims=(
        Claim("sparse wide with RigL (50%) beats dense at equal FLOPs", WIDE_RIGL, DENSE),
        Claim("RigL beats a static mask", WIDE_RIGL, WIDE),
        Claim("75% sparse, twice as wide, beats 50%", WIDER, WIDE_RIGL, decides=False),
        Claim("parallel branches of the MLP beat dense", PARALLEL, DENSE, decides=False),
        Claim("two sparse factors for each layer beat dense", FACTORIZED, DENSE, decides=False),
        Claim("doped: a low-rank part helps a sparse layer", DOPED, NARROW, decides=False),
    ),
    baseline=DENSE,
    costs=costs,
    corpus=byte_corpus,
)
