"""Rules between the keys of ``data.select``."""

from __future__ import annotations

from llmtrain.config.faults import Collector, did_you_mean
from llmtrain.config.schema import RunConfig


def check_selection(cfg: RunConfig, faults: Collector) -> None:
    """Each mode has the keys it needs and none that it ignores; sources are in the mixture."""
    select = cfg.data.select
    if select is None:
        return
    mode = "data.select.mode"
    if select.mode == "random" and select.scores is not None:
        message = "is not read by mode random; take it away, or choose another mode"
        faults.add("data.select.scores", message, mode)
    elif select.mode != "random" and not (select.scores or "").strip():
        message = f"is missing; mode {select.mode} needs a file that `llmtrain data score` made"
        faults.add("data.select.scores", message, mode)
    if select.offset and select.mode != "window":
        message = f"is not read by mode {select.mode}; take it away, or use mode: window"
        faults.add("data.select.offset", message, mode)
    elif select.offset + select.keep > 1 + 1e-9:
        faults.add(
            "data.select.offset",
            f"{select.offset:g} and keep {select.keep:g} together are more than there is; "
            f"keep at most {1 - select.offset:.3g}",
            "data.select.keep",
        )
    mixtures = [cfg.data.weights, *(phase.weights for phase in cfg.data.phases)]
    mixed = {name for weights in mixtures for name in weights}
    for i, name in enumerate(select.sources):
        if mixed and name not in mixed:
            hint = did_you_mean(name, mixed, f"the mixture has {', '.join(sorted(mixed))}")
            faults.add(
                f"data.select.sources.{i}",
                f"the mixture has no source {name!r}; {hint}",
                "data.weights",
                "data.phases",
            )
