"""What a source is worth at the end of training: branches that leave it out (2406.03476)."""

from __future__ import annotations

from llmtrain.recipes.domain_upsampling import (
    MINI_BASE,
    MINI_UPSAMPLED,
    UPSAMPLED,
    large_trunk,
)
from llmtrain.recipes.experiment import Claim, Experiment, Trial, mini_run

TRUNK, ALL = "base mix", "all sources"
# Where the branches leave: late in the miniature, whose tails would else see too little text.
MINI_AT, AT = "0.75dur", "0.9dur"


def without(name: str) -> str:
    """Label of the tail without a source."""
    return f"without {name}"


def _trials(scale: str) -> list[Trial]:
    mix, at = (MINI_UPSAMPLED, MINI_AT) if scale == "mini" else (UPSAMPLED, AT)
    keep = {"every": None if scale == "mini" else "1000step", "keep_at": [at]}
    if scale == "mini":
        data = {"seq_len": 128, "block_size": 16, "weights": MINI_BASE}
        trunk = mini_run(100, data=data, checkpoint=keep)
    else:
        trunk = {**large_trunk(scale), "checkpoint": keep}
    tails = [Trial(ALL, trunk=TRUNK, at=at, overrides=[_weights(mix)])]
    for left in mix:
        rest = {name: share for name, share in mix.items() if name != left}
        tails.append(Trial(without(left), trunk=TRUNK, at=at, overrides=[_weights(rest)]))
    return [Trial(TRUNK, trunk), *tails]


def _weights(mix: dict[str, float]) -> str:
    return "data.weights={" + ", ".join(f"{name}: {share}" for name, share in mix.items()) + "}"


EXPERIMENT = Experiment(
    name="data-ablation",
    title="What each source is worth, by branches that leave it out",
    paper=(
        "Blakeney et al. 2024, 7B, the last 10% on the upsampled mix, one run each:",
        "              all sources  without math",
        "  MMLU        43.19        29.71",
        "  GSM8K       20.47        11.37",
        "  HumanEval   20.39        21.15",
        "  core        38.46        32.54",
    ),
    trials=_trials,
    claims=(
        Claim("math is worth something to math", ALL, without("math"), ("math",)),
        Claim("docs are worth something to docs", ALL, without("docs"), ("docs",)),
        Claim("code is worth something to code", ALL, without("code"), ("code",)),
        Claim(
            "others gain without math (docs and code)",
            without("math"),
            ALL,
            ("docs", "code"),
            decides=False,
        ),
    ),
    baseline=ALL,
)
