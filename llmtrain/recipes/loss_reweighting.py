"""Dynamic loss-based sample reweighting (Sow et al., ICLR 2025, 2502.06733)."""

from __future__ import annotations

from typing import Any

from llmtrain.recipes.experiment import MINI_SOURCES, Claim, Experiment, Trial, mini_run

STRATEGIES = ("uniform", "linupper", "quadratic", "extremes")
DOMAINS = ("arxiv", "book", "cc", "c4", "github", "stackexchange", "wikipedia")


def _trials(scale: str) -> list[Trial]:
    return [Trial(name, _run(scale, name)) for name in STRATEGIES]


def _run(scale: str, strategy: str) -> dict[str, Any]:
    warmup = "0.05dur" if scale == "mini" else "1000step"
    section = {"samples": strategy, "temperature": 1.0, "warmup": warmup}
    if scale == "mini":
        data = {"seq_len": 128, "block_size": 16, "weights": dict.fromkeys(MINI_SOURCES, 1.0)}
        return mini_run(250, data=data, reweight=section)
    # The paper's two small shapes: 12 layers, and 36 layers at r = 0.4.
    layers, section["temperature"] = (36, 0.4) if scale == "paper" else (12, 1.0)
    return {
        "model": {
            "d_model": 768,
            "n_layers": layers,
            "n_heads": 12,
            "d_ff": 3072,
            "norm": "layernorm",
            "norm_bias": True,
            "position": "learned",
            "activation": "gelu_tanh",
            "attention_bias": True,
            "attention_out_bias": True,
            "mlp_bias": True,
            "tie_embeddings": True,
        },
        "data": {
            "sources": {name: {"path": f"data/slimpajama/{name}"} for name in DOMAINS},
            "seq_len": 512,
            "weights": dict.fromkeys(DOMAINS, 1.0),
        },
        "reweight": section,
        "train": {"duration": "20000step", "global_batch_size": 64},
        "optim": {"lr": 5e-4, "weight_decay": 0.01},
        "schedule": {"name": "cosine", "warmup": "500step", "min_factor": 0.2},
        "checkpoint": {"every": "1000step"},
    }


EXPERIMENT = Experiment(
    name="loss-reweighting",
    title="Weighting samples by their loss in every step",
    paper=(
        "Sow et al., ICLR 2025 (abstract): sparing low-loss samples (linupper) works best, at "
        "sizes up to 7B;",
        "its result tables were not at hand when this was written, so no number stands here.",
    ),
    trials=_trials,
    claims=(
        Claim("linupper beats uniform on held-out loss", "linupper", "uniform"),
        Claim("linupper beats quadratic", "linupper", "quadratic", decides=False),
        Claim("linupper beats extremes", "linupper", "extremes", decides=False),
    ),
    baseline="uniform",
)
