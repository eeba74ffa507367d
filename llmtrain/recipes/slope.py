"""SLoPe: double-pruned sparse pretraining with lazy low-rank adapters (ICLR 2025, 2405.16325)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmtrain.methods.slope import density_loss
from llmtrain.recipes.experiment import (
    MINI_SOURCES,
    Claim,
    Experiment,
    Trial,
    byte_corpus,
    mini_run,
    text_run,
)
from llmtrain.train.console import table

DENSE, PLAIN, SLOPE, LAZY = "dense", "2:4", "slope", "slope + adapters"


def _trials(scale: str) -> list[Trial]:
    make = _mini if scale == "mini" else _large
    return [Trial(label, make(scale, label)) for label in (DENSE, PLAIN, SLOPE, LAZY)]


def _sparse(label: str, at: str) -> dict[str, Any]:
    if label == DENSE:
        return {}
    method = "static" if label == PLAIN else "slope"
    section = {"method": method, "granularity": "2:4"}
    return {"sparsity": section if label == PLAIN else {**section, "adapters_at": at}}


def _adapters(label: str, rank: int) -> dict[str, Any]:
    return {"adapters": {"rank": rank, "freeze": False}} if label == LAZY else {}


def _mini(scale: str, label: str) -> dict[str, Any]:
    """0.1 million parameters on bytes. Adapters of 6.25% of the width take part in the last tenth:
    a hundredth would be six steps."""
    shape = {"d_model": 64, "n_layers": 2, "n_heads": 4, "d_ff": 168, "tie_embeddings": True}
    return mini_run(
        600,
        model={**shape, **_adapters(label, 4)},
        data={"seq_len": 64, "block_size": 16, "weights": dict.fromkeys(MINI_SOURCES, 1.0)},
        train={"duration": "600step", "global_batch_size": 8},
        eval={"every": None, "samples": 64},
        **_sparse(label, "0.9dur"),
    )


def _large(scale: str, label: str) -> dict[str, Any]:
    """GPT-2 Small, and the shape of OPT-2.6B; adapters of 2.1% of the width for the last 1%."""
    width, depth, heads, steps = (768, 12, 12, 20000) if scale == "small" else (2560, 32, 32, 60000)
    model = {
        "vocab_size": 50257,
        "d_model": width,
        "n_layers": depth,
        "n_heads": heads,
        "d_ff": 4 * width,
        "norm": "layernorm",
        "norm_bias": True,
        "activation": "gelu" if scale == "small" else "relu",
        **_adapters(label, round(0.021 * width)),
    }
    seq_len, rate = (1024, 6.0e-4) if scale == "small" else (2048, 1.6e-4)
    return text_run(
        model, seq_len, steps, (512, 4), optim={"lr": rate}, **_sparse(label, "0.99dur")
    )


def costs(folders: Mapping[str, Sequence[Path]]) -> list[str]:
    """Kept shares of the hidden layers' weights in the three products."""
    lost = density_loss(2, 4)
    rows = [("kept weights", "forward", "gradient of the input", "gradient of the weight")]
    for label in folders:
        kept = 1.0 if label == DENSE else 0.5
        back = kept - (lost if label in (SLOPE, LAZY) else 0.0)
        rows.append((label, f"{kept:.4g}", f"{back:.5g}", f"{kept:.4g}"))
    return table(rows)


EXPERIMENT = Experiment(
    name="slope",
    title="2:4 weights pruned twice, and low-rank adapters at the end",
    paper=(
        "SLoPe (2405.16325), GPT-2 Small, accuracy of the dense model, of SLoPe without adapters "
        "and with adapters of rank 2.1%:",
        "MMLU 22.9, 23.0, 23.0; ARC-C 20.7, 19.3, 19.3; OpenBookQA 16.2, 16.0, 16.4; WinoGrande "
        "50.6, 50.1, 50.8; HellaSwag 28.5, 27.5, 27.5; PIQA 59.8, 57.4, 57.6.",
        "BERT-large on SQuAD: dense 90.44, without 89.1, with rank 6.25% 89.5. Speed of training "
        "1.13 to 1.25 times dense on GPUs; here masked products, no faster.",
    ),
    trials=_trials,
    claims=(
        Claim("slope is within 3% of dense", SLOPE, DENSE, within=0.03),
        Claim("the second pruning costs less than 1% of the loss", SLOPE, PLAIN, within=0.01),
        Claim("adapters at the end help", LAZY, SLOPE),
    ),
    baseline=DENSE,
    costs=costs,
    corpus=byte_corpus,
)
