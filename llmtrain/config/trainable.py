"""Which parameters train when."""

from __future__ import annotations

from dataclasses import dataclass

from llmtrain.config.duration import Duration
from llmtrain.config.fields import dur, key


@dataclass(frozen=True)
class TrainableConfig:
    """Parameters that train for a part of the run; all else is frozen meanwhile."""

    parameters: list[str] = key(
        lambda: ["all"],
        "all, roles (embedding, hidden, norm, head, bias, adapter), attention, mlp, or patterns of "
        "names such as blocks.*.mlp.down.weight",
    )
    exclude: list[str] = key(list, "taken out again: written as in parameters")
    last_blocks: int | None = key(None, "of these only those in the last so many blocks", ge=1)
    half: bool = key(
        False,
        "of every block a seeded half of its attention, MLP and norm layers (HFT, 2404.18466); "
        "what lies outside of blocks trains",
    )
    half_by: str = key(
        "layer",
        "half: draw among layers, or among the matrices in them: q, k, v and out; gate, up and "
        "down; each norm",
        choices=("layer", "matrix"),
    )
    redraw: Duration | None = key(None, "half: draw again after each such time; null: once", gt=0)
    start: Duration = key(lambda: dur("0step"), "when they begin to train")
    until: Duration = key(lambda: dur("1dur"), "when they freeze again", gt=0)
