"""Domain upsampling at the end of training (Blakeney et al. 2024, 2406.03476)."""

from __future__ import annotations

from typing import Any

from llmtrain.recipes.experiment import Claim, Experiment, Trial, mini_run

TRUNK = "base mix (d = 0)"
# The miniature's stand-ins: code is the large general set, docs and math the small ones.
MINI_BASE = {"code": 0.80, "docs": 0.15, "math": 0.05}
MINI_UPSAMPLED = {"code": 0.30, "docs": 0.35, "math": 0.35}
BASE = {"large_cc": 0.3435, "small_cc": 0.3670, "domain": 0.0717, "code": 0.2178}
UPSAMPLED = {"small_cc": 0.30, "domain": 0.35, "code": 0.35}
SHARES = ("0.05", "0.1", "0.2", "0.3")


def _label(share: str) -> str:
    return f"d = {share}"


def _points() -> list[str]:
    return [f"{100 - round(100 * float(share))}/100dur" for share in SHARES]


def _tails(weights: dict[str, float]) -> list[Trial]:
    mix = "{" + ", ".join(f"{name}: {share}" for name, share in weights.items()) + "}"
    return [
        Trial(_label(share), trunk=TRUNK, at=at, overrides=[f"data.weights={mix}"])
        for share, at in zip(SHARES, _points(), strict=True)
    ]


def _trials(scale: str) -> list[Trial]:
    if scale == "mini":
        data = {"seq_len": 128, "block_size": 16, "weights": MINI_BASE}
        keep = {"every": None, "keep_at": _points()}
        trunk = mini_run(300, data=data, checkpoint=keep)
        return [Trial(TRUNK, trunk), *_tails(MINI_UPSAMPLED)]
    return [Trial(TRUNK, large_trunk(scale)), *_tails(UPSAMPLED)]


def large_trunk(scale: str) -> dict[str, Any]:
    """The trunk at the scales small and paper."""
    paper = scale == "paper"
    width, depth, heads = (4096, 32, 32) if paper else (1024, 24, 16)
    return {
        "model": {
            "vocab_size": 100277,
            "d_model": width,
            "n_layers": depth,
            "n_heads": heads,
            "d_ff": 4 * width,
            "norm": "layernorm",
            "activation": "gelu",
            "tie_embeddings": True,
        },
        "data": {
            "sources": {name: {"path": f"data/{name}"} for name in BASE},
            "seq_len": 4096 if paper else 2048,
            "weights": BASE,
        },
        "train": {
            "duration": "1Ttok" if paper else "8Btok",
            "global_batch_size": 960 if paper else 256,
            "micro_batch_size": 1 if paper else 8,
        },
        "optim": {
            "name": "lion",
            "lr": 1.2e-4 if paper else 3e-4,
            "weight_decay": 1.2e-4,
            "decoupled": "fully",
        },
        "schedule": {"name": "inverse_sqrt", "warmup": "2000step", "min_factor": 0.0},
        "checkpoint": {"every": "1000step", "keep_at": _points()},
    }


EXPERIMENT = Experiment(
    name="domain-upsampling",
    title="Raising small domain sets at the end of training",
    paper=(
        "Blakeney et al. 2024, 7B and 1T tokens, one run each, points by share d on the upsampled "
        "mix:",
        "  d          0%     5%     10%    20%    30%",
        "  MMLU       35.69  40.20  43.19  42.59  41.78",
        "  GSM8K      14.71  16.98  20.47  22.97  24.56",
        "  HumanEval  17.23  18.50  20.39  23.40  24.17",
        "  language understanding (the cost)  61.52  61.05  60.41  60.08  60.35",
    ),
    trials=_trials,
    claims=(
        Claim(
            "upsampled domains gain (docs and math, d = 0.2 against the base mix)",
            _label("0.2"),
            TRUNK,
            ("docs", "math"),
        ),
        Claim(
            "a longer phase gains more on them (d = 0.2 against d = 0.05)",
            _label("0.2"),
            _label("0.05"),
            ("docs", "math"),
        ),
        Claim(
            "the general domain pays (code, the base mix against d = 0.2)",
            TRUNK,
            _label("0.2"),
            ("code",),
            decides=False,
        ),
    ),
    baseline=TRUNK,
)
