"""From a tree of nodes to the frozen dataclasses of the schema, checking each value.

Faults are collected, never raised: a faulty value is replaced by its default, so that the rest
can still be checked, and its path is remembered so that no rule complains about it again.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
import re
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from llmtrain.config.duration import HELP, Duration
from llmtrain.config.faults import Fault, Mark, Path, did_you_mean, listing, nearest
from llmtrain.config.schema import RunConfig
from llmtrain.config.yamlfile import Node, scalar, unwrap

T = TypeVar("T")
_BOUNDS = {
    "ge": (operator.ge, "at least"),
    "gt": (operator.gt, "more than"),
    "le": (operator.le, "at most"),
    "lt": (operator.lt, "less than"),
}
_WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")
_BAD = object()


@functools.cache
def types_of(cls: Any) -> dict[str, Any]:
    """Field name -> resolved type of a section."""
    return typing.get_type_hints(cls)


def split_optional(tp: Any) -> tuple[Any, bool]:
    """``X | None`` -> (X, True); anything else -> (itself, False)."""
    if isinstance(tp, types.UnionType) or typing.get_origin(tp) is typing.Union:
        rest = [a for a in typing.get_args(tp) if a is not type(None)]
        return rest[0], True
    return tp, False


@functools.cache
def paths_by_name() -> dict[str, list[str]]:
    """Last part of a key -> its full paths, over all sections that are always there."""
    found: dict[str, list[str]] = {}

    def walk(cls: Any, prefix: str) -> None:
        for name, tp in types_of(cls).items():
            found.setdefault(name, []).append(prefix + name)
            if dataclasses.is_dataclass(tp) and tp is not Duration:
                walk(tp, f"{prefix}{name}.")

    walk(RunConfig, "")
    return found


def _meaning(rules: Mapping[str, Any]) -> str:
    """What the key is for, as the remedy where nothing better is known."""
    return f"it means: {rules['doc']}" if rules.get("doc") else ""


class Builder:
    """Builds sections and collects faults.

    failed: paths whose values were replaced. tainted: sections with a key that is unknown.
    whole: what the tree describes, in messages.
    """

    def __init__(self, faults: list[Fault], whole: str = "a run") -> None:
        self.faults, self.whole = faults, whole
        self.failed: set[Path] = {f.path for f in faults if f.path}
        self.tainted: set[Path] = set()

    def fault(self, path: Path, message: str, mark: Mark | None) -> Any:
        """Note a fault; returns the marker of a bad value."""
        if not any(path[: len(bad)] == bad for bad in self.failed):
            self.faults.append(Fault(path, message, mark))
            self.failed.add(path)
        return _BAD

    def section(self, cls: type[T], node: Node, path: Path) -> T:
        """An instance of the dataclass ``cls`` from a mapping; null means all defaults."""
        if node.value is None and not node.missing:
            return cls()
        if not isinstance(node.value, dict):
            self._wrong(node, path, "must be a section with keys of its own", "")
            return cls()
        fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
        kinds = types_of(cls)  # type: ignore[arg-type]
        given: dict[str, Any] = {}
        for name, child in node.value.items():
            if name not in fields:
                self._unknown(name, child, path, list(fields))
                continue
            rules = fields[name].metadata
            value = self.value(kinds[name], child, (*path, name), rules)
            if value is not _BAD:
                given[name] = value
        return cls(**given)

    def value(self, tp: Any, node: Node, path: Path, rules: Mapping[str, Any]) -> Any:
        """A checked value of type ``tp``, or the marker of a bad (or taken back) one."""
        tp, optional = split_optional(tp)
        if node.missing:
            return self.fault(path, "is marked ??? and must be given; set it", node.mark)
        if node.value is None and optional:
            return None
        if dataclasses.is_dataclass(tp) and tp is not Duration:
            return self.section(typing.cast(type, tp), node, path)
        origin = typing.get_origin(tp)
        if node.value is None and (node.unset or origin is not None):
            return _BAD
        if origin is list:
            return self._list(tp, node, path, rules)
        if origin is dict:
            return self._dict(tp, node, path, rules)
        if tp is Any:
            return unwrap(node)
        value = self._scalar(tp, node, path, rules)
        return value if value is _BAD else self._bounds(value, node, path, rules)

    def _unknown(self, name: str, node: Node, path: Path, known: list[str]) -> None:
        """Fault for a key that the section does not have, with where it may belong."""
        where = f"of {'.'.join(path)}" if path else f"of {self.whole}"
        elsewhere = paths_by_name().get(name, []) if self.whole == "a run" else []
        near = nearest(name, known)
        remedy = f"did you mean {near!r}?" if near else ""
        if not remedy and elsewhere:
            remedy = f"did you mean {elsewhere[0]!r}?"
        if name == "base":
            remedy = "`base` stands at the top of a file"
        if not remedy:
            remedy = f"the keys are {listing(known)}"
        self.fault((*path, name), f"is not a key {where}; {remedy}", node.mark)
        # What the key was meant to say is unknown: rules about the section would only guess.
        self.tainted.add(path or (near or name,))

    def _wrong(self, node: Node, path: Path, must: str, remedy: str) -> Any:
        """Fault for a value of the wrong type."""
        value = node.value
        if isinstance(value, dict):
            text = "a mapping"
        elif isinstance(value, list):
            text = "a list"
        elif value is None:
            text = "null"
        elif isinstance(value, bool):
            text = str(value).lower()
        else:
            text = repr(value) if len(repr(value)) < 80 else f"{repr(value)[:76]}..."
        return self.fault(
            path, f"{must}, not {text}" + (f"; {remedy}" if remedy else ""), node.mark
        )

    def _list(self, tp: Any, node: Node, path: Path, rules: Mapping[str, Any]) -> Any:
        (item,) = typing.get_args(tp)
        if not isinstance(node.value, list):
            return self._wrong(node, path, "must be a list", "write [a, b] or one '- a' a line")
        size = rules.get("length")
        if size is not None and len(node.value) != size:
            message = f"must have {size} items, not {len(node.value)}; {_meaning(rules)}"
            return self.fault(path, message, node.mark)
        found = [
            self.value(item, child, (*path, str(i)), rules) for i, child in enumerate(node.value)
        ]
        return _BAD if any(v is _BAD for v in found) else found

    def _dict(self, tp: Any, node: Node, path: Path, rules: Mapping[str, Any]) -> Any:
        _, item = typing.get_args(tp)
        if not isinstance(node.value, dict):
            return self._wrong(node, path, "must be a mapping", _meaning(rules))
        known = rules.get("key_choices")
        found: dict[str, Any] = {}
        for key, child in node.value.items():
            here = (*path, key)
            if child.unset and child.value is None and item is not Any:
                continue
            if known is not None and key not in known:
                remedy = did_you_mean(key, known, f"the keys are {listing(known)}")
                self.fault(here, f"is not a key of {'.'.join(path)}; {remedy}", child.mark)
                continue
            if not key.strip():
                self.fault(here, "has an empty name; give it one", child.mark)
                continue
            value = self.value(item, child, here, rules)
            if value is not _BAD:
                found[key] = value
        return found

    def _scalar(self, tp: Any, node: Node, path: Path, rules: Mapping[str, Any]) -> Any:
        value = node.value
        if tp is Duration:
            return self._duration(node, path, rules)
        if tp is str:
            return self._text(node, path, rules)
        if node.loose and isinstance(value, str) and node.raw is None:
            value = scalar(value)
        if tp is bool:
            if isinstance(value, str):
                value = _WORDS.get(value.lower(), value)
            if isinstance(value, bool):
                return value
            return self._wrong(node, path, "must be true or false", _meaning(rules))
        if tp is int:
            if isinstance(value, int) and not isinstance(value, bool):
                return value
            whole = isinstance(value, float) and value.is_integer() and abs(value) < 1e18
            remedy = f"write {int(value)}" if whole else _meaning(rules)
            quoted = isinstance(value, str) and type(scalar(value)) is int
            remedy = "remove the quotes" if quoted else remedy
            return self._wrong(node, path, "must be a whole number", remedy)
        assert tp is float, f"the schema has a type that is not handled: {tp}"
        return self._number(value, node, path, rules)

    def _number(self, value: Any, node: Node, path: Path, rules: Mapping[str, Any]) -> Any:
        """A finite float; integers are welcome, and ``1e-3`` that a YAML 1.1 reader left text."""
        if isinstance(value, str) and _EXPONENT.fullmatch(value):
            value = float(value)
        if isinstance(value, bool) or not isinstance(value, int | float):
            quoted = isinstance(value, str) and type(scalar(value)) in (int, float)
            remedy = "remove the quotes" if quoted else _meaning(rules)
            return self._wrong(node, path, "must be a number", remedy)
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            return self._wrong(node, path, "must be a finite number", _meaning(rules))
        return number

    def _text(self, node: Node, path: Path, rules: Mapping[str, Any]) -> Any:
        value = node.value
        if isinstance(value, str):
            return value
        if node.loose and isinstance(value, bool | int | float):
            # A shell strips quotes, so on the command line any scalar will do for text.
            return node.raw if node.raw is not None else str(value)
        simple = isinstance(value, bool | int | float) and node.raw is not None
        quoted = f"put it in quotes: '{node.raw}'" if simple and not rules.get("choices") else ""
        choices = f"one of {listing(rules['choices'])}" if rules.get("choices") else "text"
        return self._wrong(node, path, f"must be {choices}", quoted or _meaning(rules))

    def _duration(self, node: Node, path: Path, rules: Mapping[str, Any]) -> Any:
        value = node.value
        if isinstance(value, Duration):
            return value
        if isinstance(value, int | float) and not isinstance(value, bool):
            remedy = f"did you mean '{value}step'?" if isinstance(value, int) else HELP
            return self._wrong(node, path, "needs a unit", remedy)
        if not isinstance(value, str):
            return self._wrong(node, path, "must be a duration", HELP)
        try:
            found = Duration.parse(value)
        except ValueError as error:
            return self.fault(path, str(error), node.mark)
        if found.unit == "epoch" and "epoch" not in (rules.get("units") or ()):
            return self.fault(
                path, f"{value!r}: only train.duration counts epochs; {HELP}", node.mark
            )
        return found

    def _bounds(self, value: Any, node: Node, path: Path, rules: Mapping[str, Any]) -> Any:
        """``value`` if it keeps the field's simple rules."""
        doc = _meaning(rules)
        choices = rules.get("choices")
        if choices is not None and value not in choices:
            remedy = did_you_mean(str(value), [c for c in choices if c is not None], doc)
            return self._wrong(node, path, f"must be one of {listing(choices)}", remedy)
        units = rules.get("units")
        if units is not None and value.unit not in units:
            return self._wrong(node, path, f"must be in {' or '.join(units)}", doc)
        amount = value.value if isinstance(value, Duration) else value
        for name, (holds, words) in _BOUNDS.items():
            if name in rules and not holds(amount, rules[name]):
                return self._wrong(node, path, f"must be {words} {rules[name]}", doc)
        return value
