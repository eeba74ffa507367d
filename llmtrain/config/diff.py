"""What differs between two configs, key by key."""

from __future__ import annotations

from typing import Any

from llmtrain.config.dump import to_dict
from llmtrain.config.schema import RunConfig


def diff_configs(old: RunConfig, new: RunConfig) -> list[str]:
    """Lines ``key.path: old -> new`` for every leaf that differs; empty when none does."""
    before, after = _leaves(to_dict(old)), _leaves(to_dict(new))
    return [
        f"{key}: {before.get(key)} -> {after.get(key)}"
        for key in dict.fromkeys([*before, *after])
        if before.get(key) != after.get(key)
    ]


def _leaves(value: Any, path: str = "") -> dict[str, Any]:
    items = value.items() if isinstance(value, dict) else enumerate(value)
    out: dict[str, Any] = {}
    for key, inner in items:
        where = f"{path}.{key}" if path else str(key)
        if isinstance(inner, (dict, list)) and inner:
            out.update(_leaves(inner, where))
        else:
            out[where] = inner
    return out
