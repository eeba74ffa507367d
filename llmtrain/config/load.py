"""Reading a configuration: files, overrides, interpolation, types, rules; all faults at once."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any

from llmtrain.config.build import Builder
from llmtrain.config.check import find_faults
from llmtrain.config.dump import to_dict
from llmtrain.config.duration import Duration
from llmtrain.config.faults import Fault, Mark, Path, raise_faults
from llmtrain.config.merge import Files, apply_overrides, interpolate
from llmtrain.config.schema import RunConfig
from llmtrain.config.yamlfile import Node, wrap
from llmtrain.errors import ConfigError, LlmtrainError

# From a run whose length is in epochs to the length in tokens.
Epochs = Callable[[RunConfig], Duration]


def any_length(cfg: RunConfig) -> Duration:
    """In place of a length in epochs that nobody needs, or of one that is a fault: a length that
    no part of a run is beyond."""
    return Duration.parse("1000Ttok")


def load_config(
    path: str | os.PathLike[str],
    overrides: Sequence[str] = (),
    *,
    for_training: bool = False,
    epochs: Epochs | None = None,
) -> RunConfig:
    """The run described by the YAML file ``path`` with ``key.path=value`` overrides on top.

    for_training: also require what only training needs, such as a data mixture. epochs: what turns
    a ``train.duration`` in epochs into tokens (``data.epochs``, or ``any_length`` where no run of
    that length is made); None: that is a fault.
    Raises ConfigError that lists every fault as ``file:line: key: what is wrong; remedy``.
    """
    faults: list[Fault] = []
    shown = os.fspath(path)
    base = defaults()
    root = Files(faults).tree(FilePath(path), shown)
    whole = not any(f.path in ((), ("base",)) for f in faults)
    root = apply_overrides(root, overrides, base, faults)
    root = interpolate(root, base, faults)
    # Where a file is missing, rules between keys would complain about what it would have held.
    return build_config(root, faults, Mark(shown), for_training if whole else None, epochs)


def from_dict(data: Mapping[str, Any], *, for_training: bool = False) -> RunConfig:
    """The run described by plain data, as ``to_dict`` gives it; no interpolation takes place.

    Raises ConfigError that lists every fault as ``key: what is wrong; remedy``.
    """
    return build_config(wrap(data), [], None, for_training)


@functools.cache
def defaults() -> dict[str, Any]:
    """All defaults as plain data; read only."""
    return to_dict(RunConfig())


def build_config(
    root: Node,
    faults: list[Fault],
    file: Mark | None,
    for_training: bool | None,
    epochs: Epochs | None = None,
) -> RunConfig:
    """Typed tree of ``root``; raises all faults together. for_training None: no cross rules."""
    builder = Builder(faults)
    cfg = builder.section(RunConfig, root, ())
    if cfg.train.duration.unit == "epoch":
        length = any_length(cfg)
        try:
            length = length if faults else _in_tokens(cfg, epochs)
        except LlmtrainError as error:
            path = ("train", "duration")
            builder.fault(path, str(error).removeprefix("train.duration: "), _mark(root, path))
        train = dataclasses.replace(cfg.train, duration=length)
        cfg = dataclasses.replace(cfg, train=train)
    bad = builder.failed | builder.tainted
    found = [] if for_training is None else find_faults(cfg, for_training=for_training)
    for fault in found:
        involved = (fault.path, *fault.depends)
        if not any(_overlap(path, other) for path in involved for other in bad):
            exact = (_mark(root, path) for path in involved)
            above = (_mark(root, fault.path[:n]) for n in range(len(fault.path) - 1, 0, -1))
            mark = next((m for m in (*exact, *above) if m), file)
            faults.append(Fault(fault.path, fault.message, mark))
    raise_faults(faults)
    return cfg


def _in_tokens(cfg: RunConfig, epochs: Epochs | None) -> Duration:
    if epochs is None:
        raise ConfigError(
            f"{cfg.train.duration} counts epochs of data that is not opened here; write the steps "
            "or tokens that `llmtrain data plan` prints"
        )
    return epochs(cfg)


def _overlap(one: Path, other: Path) -> bool:
    """Whether one path leads to or through the other."""
    shared = min(len(one), len(other))
    return one[:shared] == other[:shared]


def _mark(node: Node, path: Path) -> Mark | None:
    """Where the value at ``path`` was written; None when a default stands there."""
    for part in path:
        value = node.value
        if isinstance(value, dict) and part in value:
            node = value[part]
        elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            node = value[int(part)]
        else:
            return None
    return node.mark
