"""The section that selects samples by scores."""

from __future__ import annotations

from dataclasses import dataclass

from llmtrain.config.fields import key


@dataclass(frozen=True)
class SelectConfig:
    """Which samples of a source are trained on, by a score file of `data score`."""

    scores: str | None = key(None, "score file; null only for mode: random")
    sources: list[str] = key(list, "sources to select from; empty: all of the mixture")
    mode: str = key(
        "window",
        "window: the best `keep` behind the first `offset`; gumbel: drawn, the best most likely; "
        "random: drawn alike; weights: all, the loss weights rising with the score",
        choices=("window", "gumbel", "random", "weights"),
    )
    order: str = key("highest", "which scores are best", choices=("highest", "lowest"))
    keep: float = key(0.5, "share of a source's samples that is kept; not for weights", gt=0, le=1)
    offset: float = key(
        0.0, "window: share of the samples, the very best, that is left out", ge=0, lt=1
    )
    temperature: float = key(
        1.0, "gumbel, weights: unit of the scores; large: all nearly alike", gt=0
    )
