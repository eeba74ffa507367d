"""Where a run's frozen weights lie, so that its checkpoints need not hold them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from llmtrain.checkpoint.layout import Base, content_of, describe, parse_step, read_layout


def refer(path: Path) -> Base:
    """The checkpoint ``path`` as a base. Raises CheckpointError where it is damaged."""
    return Base(path.resolve(), content_of(path))


def home_of(path: Path, keys: Iterable[str]) -> Path | None:
    """The one checkpoint that holds all tensors ``keys`` of ``path``: itself, its base, or none."""
    layout = read_layout(path)
    homes = {(path / c.file).resolve().parent for key in keys for c in layout[key].chunks}
    return homes.pop() if len(homes) == 1 else None


def may_be_pruned(base: Path) -> bool:
    """Whether the run that a base belongs to may delete it."""
    found = describe(base)
    return parse_step(base.name) is not None and not found.permanent
