"""The reference page of all keys, generated from the schema.

``python -m llmtrain.config.reference FILE`` writes it; a test holds the committed page current.
"""

from __future__ import annotations

import dataclasses
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmtrain.config.build import split_optional, types_of
from llmtrain.config.duration import Duration
from llmtrain.config.faults import listing
from llmtrain.config.schema import RunConfig

_INTRO = """\
# Configuration keys

A run is one YAML file. Every key below may stand in it; whatever is left out has the default.
`base: [other.yaml]` at the top of a file takes another file's keys first (paths are relative to
the file with `base`). On the command line `key.path=value` goes over the files, as in
`llmtrain train run.yaml optim.lr=3e-4 data.weights.code=0.5 data.phases.0.until=0.7dur`.
A `null` over an inherited value takes it back. `${key.path}` repeats another key's value and
`${oc.env:NAME}` reads an environment variable, but no token or key (`HF_TOKEN`, `WANDB_API_KEY`):
configs are written into runs and checkpoints. Write `\\${` for the literal characters.

Durations are `100step` (optimizer updates), `300Mtok` (tokens trained on; K, M, B, T are powers
of ten) or `0.8dur` (fraction of the run).

`llmtrain train run.yaml --print-config` prints the file with every key spelled out.

This page is generated from the schema.
"""
_NAMES = {str: "text", bool: "true or false", int: "whole number", float: "number"}
_BOUNDS = (("ge", "≥ {}"), ("gt", "> {}"), ("le", "≤ {}"), ("lt", "< {}"))


def reference_page() -> str:
    """The page as Markdown: one table per section."""
    described: dict[Any, str] = {}
    parts = [_INTRO]
    for cls, path in _sections(RunConfig, ""):
        if cls in described:
            parts.append(f"\n## `{path}`\n\nThe same keys as `{described[cls]}`.\n")
        else:
            described[cls] = path
            parts.append(_section(cls, path))
    return "".join(parts)


def _inner(tp: Any) -> tuple[Any, str] | None:
    """The section class inside a field's type and how its key is written, if there is one."""
    tp, _ = split_optional(tp)
    if dataclasses.is_dataclass(tp) and tp is not Duration:
        return tp, ""
    arguments = typing.get_args(tp)
    if arguments and dataclasses.is_dataclass(arguments[-1]) and arguments[-1] is not Duration:
        return arguments[-1], ".NAME" if typing.get_origin(tp) is dict else ".N"
    return None


def _sections(cls: Any, path: str) -> Iterator[tuple[Any, str]]:
    """A section and those below it, depth first."""
    yield cls, path
    for name, tp in types_of(cls).items():
        inner = _inner(tp)
        if inner is not None:
            yield from _sections(inner[0], f"{path}.{name}{inner[1]}".lstrip("."))


def _section(cls: Any, path: str) -> str:
    """Heading, description and table of one section."""
    title = f"`{path}`" if path else "The run"
    summary = " ".join((cls.__doc__ or "").split())
    lines = ["", f"## {title}", "", summary, "", "| key | type | default | meaning |"]
    lines.append("| --- | --- | --- | --- |")
    for field in dataclasses.fields(cls):
        tp = types_of(cls)[field.name]
        inner = _inner(tp)
        doc = field.metadata["doc"] or (" ".join((inner[0].__doc__ or "").split()) if inner else "")
        cells = (f"`{field.name}`", _type(tp, field.metadata), _default(field, inner), doc)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _type(tp: Any, rules: Any) -> str:
    """A field's type in words, with its bounds or choices."""
    tp, optional = split_optional(tp)
    if rules.get("choices"):
        known = [c for c in rules["choices"] if c is not None]
        words = ", ".join(f"`{c}`" for c in known)
        words = f"list of {words}" if typing.get_origin(tp) is list else words
    else:
        words = _words(tp)
        if rules.get("key_choices"):
            words += f" (names: {listing(rules['key_choices'])})"
        if rules.get("units"):
            words += f" in {' or '.join(rules['units'])}"
        bounds = [text.format(rules[name]) for name, text in _BOUNDS if name in rules]
        words += f", {' and '.join(bounds)}" if bounds else ""
    return f"{words}, or null" if optional else words


def _words(tp: Any) -> str:
    if tp is Duration:
        return "duration"
    if dataclasses.is_dataclass(tp):
        return "section"
    origin, arguments = typing.get_origin(tp), typing.get_args(tp)
    if origin is list:
        return f"list of {_plural(_words(arguments[0]))}"
    if origin is dict:
        return "mapping of names to " + (
            "anything" if arguments[1] is Any else _plural(_words(arguments[1]))
        )
    return _NAMES[tp]


def _plural(words: str) -> str:
    first, rest = words.partition(" of ")[0], words.partition(" of ")[1:]
    return f"{first}s{''.join(rest)}"


def _default(field: Any, inner: Any) -> str:
    """A field's default as YAML writes it; sections have theirs key by key."""
    factory = field.default_factory
    value = factory() if factory is not dataclasses.MISSING else field.default
    if inner is not None and not isinstance(value, list | dict) and value is not None:
        return ""
    if isinstance(value, bool) or value is None:
        return f"`{'null' if value is None else str(value).lower()}`"
    if isinstance(value, list):
        return f"`[{', '.join(map(str, value))}]`"
    return f"`{value}`" if value != "" else '`""`'


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m llmtrain.config.reference FILE")
    Path(sys.argv[1]).write_text(reference_page(), encoding="utf-8")
