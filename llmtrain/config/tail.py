"""The config of a branch: another tail laid over the config of the run it leaves."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path as FilePath
from typing import Any

from llmtrain.config.dump import escaped, to_dict
from llmtrain.config.duration import Duration
from llmtrain.config.faults import Fault, Mark
from llmtrain.config.load import build_config, defaults
from llmtrain.config.merge import COMMAND_LINE, Files, apply_overrides, interpolate, merge
from llmtrain.config.phase_ends import end_text, phase_end
from llmtrain.config.schema import PhaseConfig, RunConfig
from llmtrain.config.yamlfile import Node, wrap
from llmtrain.errors import ConfigError


@dataclass(frozen=True)
class Tail:
    """What a tail makes of its trunk's config.

    cfg: the branch's. named: the tail gives a ``name``. weights: the shares from the branch point
    on where the tail writes ``data.weights``, else None.
    """

    cfg: RunConfig
    named: bool
    weights: dict[str, float] | None


def load_tail(
    trunk: RunConfig,
    step: int,
    path: str | os.PathLike[str] | None,
    overrides: Sequence[str] = (),
) -> Tail:
    """``trunk`` with the YAML file ``path`` and ``key.path=value`` overrides laid over it.

    step: update of the trunk after which the branch leaves it. ``data.weights`` or ``data.phases``
    of the tail describe the mixture from there on; what came before is put in front of them.
    Raises ConfigError that lists every fault with file, line and remedy.
    """
    faults: list[Fault] = []
    shown = os.fspath(path) if path is not None else COMMAND_LINE
    own = Files(faults).tree(FilePath(path), shown) if path is not None else Node({}, Mark(shown))
    mixture = [text for text in overrides if _is_mixture(text)]
    rest = [text for text in overrides if text not in mixture]
    own = apply_overrides(own, mixture, {}, faults)
    base = escaped(to_dict(trunk))
    base["train"]["stop_after"] = None  # where one process of the trunk stopped, no more
    future, weighted = _future(own)
    if future is not None:
        base["data"].update(weights={}, phases=[])
        before = [wrap(phase) for phase in past_phases(trunk, step)]
        own = _put_data(own, replace(future, value=[*before, *future.value]))
    root = apply_overrides(merge(wrap(base), own), rest, defaults(), faults)
    root = interpolate(root, defaults(), faults)
    cfg = build_config(root, faults, Mark(shown), True)
    named = "name" in own.value or any(text.partition("=")[0] == "name" for text in rest)
    return Tail(cfg, named, dict(cfg.data.phases[-1].weights) if weighted else None)


def past_phases(cfg: RunConfig, step: int) -> list[dict[str, Any]]:
    """The mixture of ``cfg`` up to update ``step``, as plain phases that end where they ended.

    Ends are in tokens, so that they stay in place when the run's length changes. Raises
    ConfigError when the step lies inside a linear ramp, which cannot be cut.
    """
    seq_len, batch = cfg.data.seq_len, cfg.train.global_batch_size
    total = max(cfg.train.duration.steps(seq_len * batch), 1)
    cut, start = step * batch, 0
    out: list[dict[str, Any]] = []
    for phase in cfg.data.phases or [PhaseConfig(weights=cfg.data.weights)]:
        if start >= cut:
            break
        end = phase_end(cfg, phase, total)
        if end > cut and phase.ramp == "linear":
            raise ConfigError(
                f"step {step} lies inside the linear ramp of the trunk's data.phases that ends at "
                f"{end_text(phase)}; branch at its start or its end, or keep the trunk's mixture"
            )
        end = min(end, cut)
        until = str(Duration.parse(f"{end * seq_len}tok"))
        out.append({"until": until, "weights": dict(phase.weights), "ramp": phase.ramp})
        start = end
    return out


def _is_mixture(override: str) -> bool:
    """Whether an override describes the mixture as a whole; an item of the trunk's is none."""
    key = override.partition("=")[0].strip()
    return key in ("data.weights", "data.phases") or key.startswith("data.weights.")


def _future(own: Node) -> tuple[Any, bool]:
    """(the tail's phases as a node, whether they were written as weights); None without either."""
    data = own.value.get("data")
    found = data.value if data is not None and isinstance(data.value, dict) else {}
    weights, phases = found.get("weights"), found.get("phases")
    if weights is not None and phases is not None:
        return None, False  # a fault that the rules between keys report
    if weights is not None:
        phase = Node({"until": wrap("1dur", weights.mark), "weights": weights}, weights.mark)
        return Node([phase], weights.mark), True
    if phases is not None and isinstance(phases.value, list):
        return phases, False
    return None, False


def _put_data(own: Node, phases: Node) -> Node:
    """``own`` with its mixture replaced by ``phases``."""
    data = own.value["data"]
    inner = {k: v for k, v in data.value.items() if k != "weights"}
    inner["phases"] = phases
    return replace(own, value={**own.value, "data": replace(data, value=inner)})
