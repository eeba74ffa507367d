"""Rules of the section ``online``."""

from __future__ import annotations

from llmtrain.config.faults import Collector, did_you_mean, listing
from llmtrain.config.phase_ends import end_text, phase_end
from llmtrain.config.schema import PhaseConfig, RunConfig

_RUN_LENGTH = ("train.duration", "train.global_batch_size", "data.seq_len")


def check_online(cfg: RunConfig, faults: Collector) -> None:
    """Weights can only follow losses where the plan leaves them free."""
    online = cfg.online
    if online is None:
        return
    phases = cfg.data.phases or [PhaseConfig(weights=cfg.data.weights)]
    tokens = cfg.train.global_batch_size * cfg.data.seq_len
    total = max(cfg.train.duration.steps(tokens), 1)
    batch = cfg.train.global_batch_size
    begin = -(-phase_end(cfg, phases[-2], total) // batch) if len(phases) > 1 else 0
    start = online.start.steps(tokens, total)
    first = start + max(online.every.steps(tokens, total), 1)
    if start < begin:
        faults.add(
            "online.start",
            f"{online.start} lies before the last phase of data.phases, which begins at "
            f"{end_text(phases[-2])}; only that phase's weights change online: write {begin}step",
            "data.phases",
            *_RUN_LENGTH,
        )
    elif first >= total:
        faults.add(
            "online.every",
            f"the first change would come at step {first}, when the run ends (it has {total} "
            "steps); make online.start or online.every shorter",
            "online.start",
            *_RUN_LENGTH,
        )
    if len(phases) > 1 and phases[-1].ramp == "linear":
        faults.add(
            f"data.phases.{len(phases) - 1}.ramp",
            "is linear, but online changes the weights of the last phase; use step",
            "online",
        )
    used = [name for name, weight in phases[-1].weights.items() if weight > 0]
    _check_sources(cfg, used, faults)
    _check_method(cfg, used, faults)


def _check_sources(cfg: RunConfig, used: list[str], faults: Collector) -> None:
    for name in used:
        source = cfg.data.sources.get(name)
        if source is not None and source.max_epochs is not None:
            faults.add(
                ("data", "sources", name, "max_epochs"),
                "cannot be promised while online changes the weights; take it away, or take "
                "online away",
                "online",
            )


def _check_method(cfg: RunConfig, used: list[str], faults: Collector) -> None:
    online = cfg.online
    assert online is not None
    method = "online.method"
    if online.method == "doremi" and online.reference is None:
        message = "is missing: doremi compares with a reference model; name a checkpoint or a run"
        faults.add("online.reference", message, method)
    graph = {"graph": bool(online.graph), "graph_file": online.graph_file is not None}
    for key, given in {**graph, "relative": online.relative}.items():
        if given and online.method != "skill-it":
            message = f"is not read by {online.method}; take it away, or use method: skill-it"
            faults.add(f"online.{key}", message, method)
    if online.method != "doremi" and online.reference is not None:
        message = f"is not read by {online.method}; take it away, or use method: doremi"
        faults.add("online.reference", message, method)
    if all(graph.values()):
        faults.add("online.graph", "stands beside online.graph_file; keep one", "online.graph_file")
    if len(used) == 1:
        message = "has nothing to change: the last phase has one source; give it two or more"
        faults.add("online", message, "data.weights", "data.phases")
    named = [(i, i) for i in online.graph] + [(i, j) for i, r in online.graph.items() for j in r]
    for i, j in named if used else ():
        if j not in used:
            remedy = did_you_mean(j, used, f"the last phase has {listing(used)}")
            path = ("online", "graph", i) if i == j else ("online", "graph", i, j)
            faults.add(path, f"{j!r} is no source of the last phase; {remedy}", "data.weights")
    if online.graph and not any(e for row in online.graph.values() for e in row.values()):
        faults.add("online.graph", "has no edge above 0, so no weight would change; add one")
