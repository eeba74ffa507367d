"""Filters by metadata: which documents a record's other fields let through."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmtrain.config.filters import FilterConfig
from llmtrain.data.sources.base import Bad, Dropped


def judge(
    record: Mapping[str, Any], filters: Mapping[str, FilterConfig], path: str, line: int
) -> Dropped | Bad | None:
    """None to keep the document; the first filter, in the config's order, that drops it.

    A field is a key, or keys with dots into nested objects. Bad where a number is wanted and
    something else stands there.
    """
    for field, rule in filters.items():
        value = value_of(record, field)
        if value is None:
            if rule.missing == "drop":
                return Dropped(f"{field} missing")
            continue
        text = str(value).lower() if isinstance(value, bool) else str(value)
        if (rule.one_of and text not in rule.one_of) or text in rule.none_of:
            return Dropped(field)
        if rule.min is None and rule.max is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            kind = type(value).__name__
            return Bad("wrong type", path, line, f"{field!r} is a {kind}, not a number")
        low, high = rule.min, rule.max
        if not ((low is None or value >= low) and (high is None or value <= high)):
            return Dropped(field)  # a NaN, too
    return None


def value_of(record: Mapping[str, Any], field: str) -> Any:
    """The value under ``field``, a plain key or a path with dots; None where there is none."""
    if field in record:
        return record[field]
    value: Any = record
    for part in field.split("."):
        if not isinstance(value, Mapping):
            return None
        value = value.get(part)
    return value


def columns(filters: Mapping[str, FilterConfig], have: list[str]) -> list[str]:
    """The columns among ``have`` that the filters read: a field's own, or that of its first key."""
    wanted = [field if field in have else field.partition(".")[0] for field in filters]
    return [name for name in dict.fromkeys(wanted) if name in have]
