"""Pruning a training set by scores taken early in training (Paul, Ganguli and Dziugaite 2021)."""

from __future__ import annotations

from typing import Any

from llmtrain.recipes.experiment import Claim, Experiment, Scoring, Trial, mini_run

ALL = "all samples"
RANDOM = "random 50%"
HIGHEST = "highest EL2N 50%"
MIDDLE = "middle EL2N 50%"
EARLY = "0.2dur"
SELECTIONS: dict[str, dict[str, Any]] = {
    HIGHEST: {},
    MIDDLE: {"offset": 0.25},
}


def _trials(scale: str) -> list[Trial]:
    scoring = Scoring(ALL, EARLY, "el2n")
    out = [
        Trial(ALL, _run(scale, checkpoint={"every": None, "keep_at": [EARLY]})),
        Trial(RANDOM, _run(scale, {"mode": "random", "keep": 0.5})),
    ]
    for label, section in SELECTIONS.items():
        select = {"scores": "scores.parquet", "keep": 0.5, **section}
        out.append(Trial(label, _run(scale, select), scoring=scoring))
    return out


def _run(scale: str, select: dict[str, Any] | None = None, **sections: Any) -> dict[str, Any]:
    more = {} if select is None else {"select": select}
    if scale == "mini":
        # Nearly an epoch of the documentation, so that half of it is seen nearly twice.
        data = {"seq_len": 128, "block_size": 16, "weights": {"docs": 1.0}, **more}
        model = {"d_model": 64, "n_layers": 2, "n_heads": 2, "d_ff": 172, "tie_embeddings": True}
        return mini_run(200, data=data, model=model, **sections)
    paper = scale == "paper"
    return {
        "model": {
            "d_model": 2048 if paper else 768,
            "n_layers": 16 if paper else 12,
            "n_heads": 16 if paper else 12,
            "tie_embeddings": True,
        },
        "data": {
            "sources": {"web": {"path": "data/web"}},
            "seq_len": 2048 if paper else 1024,
            "weights": {"web": 1.0},
            **more,
        },
        "train": {
            "duration": "20000step",
            "global_batch_size": 512 if paper else 256,
            "micro_batch_size": 8,
        },
        "optim": {"lr": 6e-4 if paper else 1e-3},
        "schedule": {"name": "cosine", "warmup": "500step", "min_factor": 0.1},
        **sections,
    }


EXPERIMENT = Experiment(
    name="data-diet",
    title="Training on half of the samples, chosen by their EL2N early in training",
    paper=(
        "Paul et al. 2021, images (abstract): by EL2N a few epochs into training, half of CIFAR-10",
        "can be pruned and accuracy rises slightly; its tables were not at hand: no number here.",
        "The paper averages the scores of about 10 initialisations; here one run gives them.",
    ),
    trials=_trials,
    claims=(
        Claim("the highest half by EL2N beats a random half", HIGHEST, RANDOM, ("docs",)),
        Claim("the highest half beats all samples", HIGHEST, ALL, ("docs",), decides=False),
        Claim("the middle half beats a random half", MIDDLE, RANDOM, ("docs",), decides=False),
    ),
    baseline=RANDOM,
)
