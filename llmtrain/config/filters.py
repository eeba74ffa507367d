"""Filters of documents by what else their record says."""

from __future__ import annotations

from dataclasses import dataclass

from llmtrain.config.fields import key


@dataclass(frozen=True)
class FilterConfig:
    """What a field of a document's record must be for the document to be kept."""

    min: float | None = key(None, "the field is a number, at least this")
    max: float | None = key(None, "the field is a number, at most this")
    one_of: list[str] = key(list, "the field, as text, is one of these")
    none_of: list[str] = key(list, "the field, as text, is none of these")
    missing: str = key(
        "drop", "documents without the field, or with null in it", choices=("drop", "keep")
    )
