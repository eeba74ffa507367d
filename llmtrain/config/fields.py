"""What the fields of a config section are made of.

A field's ``doc`` is what ``--help`` and the reference page print; rules are checked by
``config.build`` with the user's own path, file and line:

- ``choices``, ``ge``, ``gt``, ``le``, ``lt``: for lists and mappings they hold for each value;
- ``length``: number of items of a list; ``key_choices``: keys of a mapping;
- ``units``: units a duration may have;
- ``hook``: on a method's section in ``RunConfig``: ``package.module:callable`` that makes the
  training hook from the section (``train.hooks``).
"""

from __future__ import annotations

from dataclasses import field
from typing import Any

from llmtrain.config.duration import Duration


def key(default: Any = None, doc: str = "", **rules: Any) -> Any:
    """A config field: default (or factory), documentation and simple bounds or choices."""
    metadata = {"doc": doc, **rules}
    if isinstance(default, type) or (callable(default) and not isinstance(default, Duration)):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


def dur(text: str) -> Duration:
    """Shorthand for a duration default."""
    return Duration.parse(text)
