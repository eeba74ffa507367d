"""Sections of methods that change what data counts, or how much."""

from __future__ import annotations

from dataclasses import dataclass

from llmtrain.config.duration import Duration
from llmtrain.config.fields import dur, key


@dataclass(frozen=True)
class DietConfig:
    """A small subset that is repeated at first (lottery tickets on a data diet, 2206.01278)."""

    samples: int = key(
        0, "the run's first so many samples are repeated; a multiple of the global batch", ge=1
    )
    until: Duration = key(
        lambda: dur("0.05dur"), "from here on samples are those of any run; lottery.rewind, say"
    )


@dataclass(frozen=True)
class ReweightConfig:
    """Loss weights of samples and of tokens, from their losses in every step."""

    samples: str = key(
        "none",
        "weights over the global batch by sample loss: linupper spares easy samples, quadratic "
        "prefers middling ones, extremes both ends, plain rises with the loss; uniform: all alike",
        choices=("none", "uniform", "linupper", "quadratic", "extremes", "plain"),
    )
    temperature: float = key(
        1.0, "samples: how much the weights differ; large: all nearly alike", gt=0
    )
    warmup: Duration = key(lambda: dur("0.05dur"), "samples: time before the temperature holds")
    warmup_temperature: float | None = key(
        None, "samples: temperature until then; null: all samples alike", gt=0
    )
    tokens: str = key(
        "none",
        "weights of tokens, p their probability: focal (1 - p)^gamma by the model itself, prior "
        "(1 - p)^gamma by the reference, rho only tokens with the most loss beyond the reference's",
        choices=("none", "focal", "prior", "rho"),
    )
    gamma: float = key(1.0, "tokens: exponent of focal and prior", ge=0)
    keep: float = key(0.6, "tokens: share of the global batch's tokens that rho keeps", gt=0, le=1)
    reference: str | None = key(None, "tokens: checkpoint or run of the reference, for prior, rho")
    losses: str | None = key(
        None, "tokens: the reference's losses, a file of `data score --method token-losses`"
    )
