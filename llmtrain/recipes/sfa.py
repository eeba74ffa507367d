"""Soup to go: mitigating forgetting with model averaging (SFA, 2501.05559), and its rivals."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from llmtrain.recipes.experiment import Claim, Experiment, Trial, mini_run
from llmtrain.train.console import human, table

SEQUENTIAL, REPLAY = "sequential", "replay"
GRID = [(p, beta) for p in (0.1, 0.25) for beta in (0.25, 0.5)]
OLD, NEW = ("code", "docs"), ("math",)
# EWC's strength of equal say for old and new data is 1 / seq_len = 0.008; these lie around it.
RIVALS: dict[str, dict[str, Any]] = {
    "l2 0.01": {"method": "l2", "strength": 0.01},
    "l2 0.1": {"method": "l2", "strength": 0.1},
    "ewc 0.003": {"method": "ewc", "strength": 0.003, "samples": 64},
    "ewc 0.03": {"method": "ewc", "strength": 0.03, "samples": 64},
    REPLAY: {"method": "sequential", "replay": 0.25},
    "wise-ft": {"method": "wise-ft", "beta": 0.5},
    "task arithmetic": {"method": "task-arithmetic", "scale": 0.5},
    "ties": {"method": "ties", "density": 0.2, "scale": 1.0},
    "model stock": {"method": "model-stock"},
}


def sfa_label(p: float, beta: float) -> str:
    """A setting's row in the table."""
    return f"sfa p={p:g} b={beta:g}"


# What claims look at, fixed before any run: the values that seem nearest to the paper's.
MAIN = sfa_label(0.25, 0.5)


def _trials(scale: str) -> list[Trial]:
    mini = scale == "mini"
    methods: dict[str, dict[str, Any]] = {SEQUENTIAL: {"method": "sequential"}}
    methods |= {sfa_label(p, b): {"method": "sfa", "p": p, "beta": b} for p, b in GRID}
    methods |= RIVALS
    return [
        Trial(
            label,
            _mini(method) if mini else _large(scale, method),
            shares=_shared(label) if mini else {},
        )
        for label, method in methods.items()
    ]


def _shared(label: str) -> dict[str, str]:
    """Runs that are the same under two methods, by folder, and under which they are made."""
    if label == SEQUENTIAL:
        return {}
    found = {"1-code": SEQUENTIAL}
    if label in ("wise-ft", "task arithmetic", "ties", "model stock"):
        found["2-docs"] = SEQUENTIAL
    if label in ("ties", "model stock"):
        found["3-math"] = "task arithmetic"
    return found


def _mini(method: dict[str, Any]) -> dict[str, Any]:
    """0.5 million parameters, 1,024 tokens a step; learning rates of a trunk and of finetuning."""
    shape = {"d_model": 96, "n_layers": 3, "n_heads": 4, "d_ff": 256, "tie_embeddings": True}
    tasks: list[dict[str, Any]] = [{"name": "code", "weights": {"code": 1.0}}]
    tasks[0]["duration"] = "200step"
    for name in ("docs", "math"):
        tasks.append({"name": name, "weights": {name: 1.0}, "overrides": {"optim.lr": 1.0e-3}})
    return mini_run(
        50,
        model=shape,
        data={"seq_len": 128, "block_size": 16},
        train={"duration": "50step", "global_batch_size": 8},
        eval={"every": None, "samples": 64},
        continual={**method, "tasks": tasks},
    )


def _large(scale: str, method: dict[str, Any]) -> dict[str, Any]:
    """Math, law and code after pretraining; shapes of Pythia's 410M and 2.8B models."""
    width, depth, heads = (2560, 32, 32) if scale == "paper" else (1024, 24, 16)
    domains = ("math", "law", "code")
    sources = {name: {"path": f"data/{name}"} for name in domains}
    heldout = {name: {"path": f"data/{name}_heldout"} for name in domains}
    tasks = [{"name": name, "weights": {name: 1.0}} for name in domains]
    return {
        "model": {
            "vocab_size": 50304,
            "d_model": width,
            "n_layers": depth,
            "n_heads": heads,
            "d_ff": 4 * width,
            "norm": "layernorm",
            "norm_bias": True,
            "activation": "gelu",
        },
        "data": {"sources": sources, "heldout": heldout, "seq_len": 2048},
        "train": {"duration": "1000step", "global_batch_size": 64, "micro_batch_size": 4},
        "optim": {"lr": 2.0e-5, "weight_decay": 0.0},
        "schedule": {"name": "cosine", "warmup": "0.03dur", "min_factor": 0.1},
        "checkpoint": {"every": "200step"},
        "init": {"path": "models/pretrained"},
        "continual": {**method, "tasks": tasks},
    }


def costs(folders: Mapping[str, Sequence[Path]]) -> list[str]:
    """Old and new tasks, and what each method costs: means over seeds of every sequence's record.

    Times are those a sequence takes alone, with the runs that it shares here with others.
    """
    head = ("after the last task", "code, docs (old)", "math (new)", "forgetting")
    rows = [(*head, "kept in memory", "read from disk", "replayed", "training", "besides")]
    for label, seeds in folders.items():
        found = [json.loads((f / "sequence.json").read_text(encoding="utf-8")) for f in seeds]
        ends = [one["rows"][-1]["losses"] for one in found]
        per_row = [one["rows"] for one in found]

        def total(key: str, per_row: list[Any] = per_row) -> float:
            return mean(float(sum(row[key] for row in rows)) for rows in per_row)

        kept = mean(float(max(row["kept_bytes"] for row in rows)) for rows in per_row)
        rows.append(
            (
                label,
                f"{mean(mean(end[d] for d in OLD) for end in ends):.4f}",
                f"{mean(mean(end[d] for d in NEW) for end in ends):.4f}",
                f"{mean(one['forgetting'] for one in found):+.4f}",
                f"{human(kept)}B",
                f"{human(total('stored_bytes'))}B",
                f"{human(total('replayed_tokens'))} tokens",
                f"{total('seconds'):.1f} s",
                f"{total('beside_seconds'):.1f} s",
            )
        )
    return table(rows)


def _claims() -> list[Claim]:
    gains = "SFA forgets less than sequential training (code, docs)"
    claims = [
        Claim(gains, MAIN, SEQUENTIAL, OLD),
        Claim("at little cost: the mean over all tasks is lower, too", MAIN, SEQUENTIAL),
        Claim(
            "near replay: on all tasks below the middle between sequential and replay",
            MAIN,
            SEQUENTIAL,
            also=REPLAY,
        ),
        Claim(
            "the cost on the new task (math: sequential against SFA)",
            SEQUENTIAL,
            MAIN,
            NEW,
            decides=False,
        ),
    ]
    for label in RIVALS:
        text = f"SFA against {label}, all tasks"
        claims.append(Claim(text, MAIN, label, decides=False))
    return claims


EXPERIMENT = Experiment(
    name="sfa",
    title="Averaging with earlier weights against forgetting: code, then docs, then math",
    paper=(
        "Soup to go (2501.05559), language models (Pythia 2.8B, math, law and code in sequence):",
        "beats L2, EWC, Task Arithmetic, TIES and WiSE-FT, about on par with or below a replay",
        "buffer, retention stronger for p < 1. Its tables and its grid of p and beta were not at",
        "hand when this was written, so no number of the paper stands here.",
    ),
    trials=_trials,
    claims=_claims(),
    baseline=SEQUENTIAL,
    costs=costs,
)
