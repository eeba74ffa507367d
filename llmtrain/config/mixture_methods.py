"""Sections of methods that change the mixture while a run is trained."""

from __future__ import annotations

from dataclasses import dataclass

from llmtrain.config.duration import Duration
from llmtrain.config.fields import dur, key


@dataclass(frozen=True)
class OnlineConfig:
    """Mixture weights that follow held-out losses, changed at planned steps of the last phase."""

    method: str = key(
        "skill-it",
        "skill-it: more of the sources that help where losses are high, by a skill graph; doremi: "
        "more of those whose loss lies most beyond a reference model's; fixed: weights stay, a "
        "control at the same cost",
        choices=("skill-it", "doremi", "fixed"),
    )
    every: Duration = key(lambda: dur("0.1dur"), "time between changes of the weights", gt=0)
    start: Duration = key(lambda: dur("0step"), "the first change is `every` after this")
    eta: float | None = key(
        None, "how strongly weights follow losses; null: skill-it 0.1, doremi 1", gt=0
    )
    window: int = key(3, "skill-it: latest changes whose losses are added up", ge=1)
    relative: bool = key(False, "skill-it: losses over those at the first change")
    graph: dict[str, dict[str, float]] = key(
        dict,
        "skill-it: source: {source it helps: how much}; empty: every source helps itself, by 1",
        ge=0,
    )
    graph_file: str | None = key(
        None, "skill-it: the graph as `llmtrain branch --skill-graph` wrote it, instead of graph"
    )
    smoothing: float = key(
        1e-3, "doremi: part of the weights that is the same for all sources", ge=0, le=1
    )
    reference: str | None = key(None, "doremi: checkpoint or run of the reference model")
    samples: int = key(64, "held-out sequences of each source that are measured", ge=1)


@dataclass(frozen=True)
class ReplayConfig:
    """Tokens of an earlier run's sources, in the shares that run was trained on."""

    run: str = key("", "folder of the earlier run")
    fraction: float = key(0.05, "its part of all tokens; the weights share the rest", gt=0, lt=1)
    start: Duration = key(lambda: dur("0step"), "from when on; in a branch: its branch point")
