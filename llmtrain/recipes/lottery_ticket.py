"""Lottery tickets by magnitude pruning with rewinding, and why they work.

Frankle et al. 2020 (1912.05671); Paul et al. 2022 (2206.01278 and 2210.03044).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from llmtrain.finetune.lottery import RESULT
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

LEVELS, PRUNE, REWIND = 5, 0.2, "0.1dur"
# A level whose mean loss is at most this share above the dense run's counts as matching.
MATCHING = 0.01


def level_label(level: int) -> str:
    """A level's row in the table."""
    return f"level {level}, {(1 - PRUNE) ** level:.0%}"


DENSE, MIDDLE, LAST = (level_label(level) for level in (0, 3, LEVELS))
RANDOM = f"random mask, {(1 - PRUNE) ** LEVELS:.0%}"


def _trials(scale: str) -> list[Trial]:
    if scale != "mini":
        return [Trial("tickets", _large(scale))]
    levels = [Trial(level_label(level), _mini(), level=level) for level in range(LEVELS + 1)]
    section = f"sparsity={{density: {(1 - PRUNE) ** LEVELS:.6f}}}"
    return [*levels, Trial(RANDOM, trunk=DENSE, at=REWIND, overrides=[section])]


def _lottery(levels: int) -> dict[str, Any]:
    return {
        "levels": levels,
        "prune": PRUNE,
        "rewind": REWIND,
        "points": 3 if levels == LEVELS else 5,
    }


def _mini() -> dict[str, Any]:
    """0.1 million parameters on bytes."""
    shape = {"d_model": 64, "n_layers": 2, "n_heads": 4, "d_ff": 168, "tie_embeddings": True}
    return mini_run(
        120,
        model=shape,
        data={"seq_len": 64, "block_size": 16, "weights": dict.fromkeys(MINI_SOURCES, 1.0)},
        train={"duration": "120step", "global_batch_size": 8},
        eval={"every": None, "samples": 32},
        checkpoint={"every": None, "keep_at": [REWIND]},
        lottery=_lottery(LEVELS),
    )


def _large(scale: str) -> dict[str, Any]:
    """Language models; the papers prune image classifiers, so the sizes are ours."""
    width, depth, heads, steps = (768, 12, 12, 4768) if scale == "small" else (1024, 24, 16, 12000)
    model = {"d_model": width, "n_layers": depth, "n_heads": heads}
    return text_run(model, 1024, steps, (512, 8), lottery=_lottery(16))


def costs(folders: Mapping[str, Sequence[Path]]) -> list[str]:
    """The barrier between each level and the one before, and how high it is where levels match."""
    found = [
        json.loads((run.parent / RESULT).read_text(encoding="utf-8")) for run in folders[DENSE]
    ]
    rows = [("level", "kept weights", "loss over dense", "barrier to the level before")]
    matching: list[int] = []
    for level in range(1, LEVELS + 1):
        own = [seed[level] for seed in found]
        rise = mean(_mean(row) / _mean(seed[0]) - 1 for row, seed in zip(own, found, strict=True))
        barrier = mean(row["barrier"] for row in own)
        rows.append((str(level), f"{own[0]['density']:.4f}", f"{rise:+.2%}", f"{barrier:.4f}"))
        if rise <= MATCHING and len(matching) == level - 1:
            matching.append(level)
    lines = table(rows)
    if not matching:
        return [*lines, f"no level is within {MATCHING:.0%} of the dense run"]
    highest = max(mean(seed[level]["barrier"] for seed in found) for level in matching)
    dense = mean(_mean(seed[0]) for seed in found)
    return [
        *lines,
        f"levels within {MATCHING:.0%} of the dense run: 1 to {matching[-1]}; the highest barrier "
        f"there is {highest:.4f} nats, {highest / dense:.2%} of the dense loss",
    ]


def _mean(row: dict[str, Any]) -> float:
    losses: dict[str, float] = row["losses"]
    return mean(losses.values())


EXPERIMENT = Experiment(
    name="lottery-ticket",
    title="Lottery tickets: magnitude pruning with rewinding, level by level",
    paper=(
        "Frankle et al. 2020 (1912.05671), Paul et al. 2022 (2206.01278, 2210.03044), image "
        "classifiers: 20% a level, 16 to 20 levels, rewinding to a few hundred steps;",
        "tickets match the dense network down to a few percent of its weights, beat random masks "
        "of their density, and matching levels are linearly connected without a barrier.",
    ),
    trials=_trials,
    claims=(
        Claim(
            "a ticket of 51% of the weights is within 1% of dense", MIDDLE, DENSE, within=MATCHING
        ),
        Claim("a ticket of 33% is within 1% of dense", LAST, DENSE, within=MATCHING),
        Claim("a ticket of 33% beats a random mask of its density", LAST, RANDOM),
    ),
    baseline=DENSE,
    seeds=2,
    costs=costs,
    corpus=byte_corpus,
)
