"""YAML text to a tree of nodes that know their file and line.

Only plain data: mappings with text keys, lists, text, numbers, true, false, null. Scalars follow
YAML 1.2, so ``1e-3`` is a number, ``no`` is a word and ``1:30`` is not ninety. Keys are taken
as they are written. Anchors, aliases and ``<<`` work; duplicate keys and tags are faults.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path as FilePath
from typing import Any

import yaml

from llmtrain.config.faults import Fault, Mark, did_you_mean

MAX_BYTES = 4 << 20
MAX_NODES = 50_000
MISSING = "tag:llmtrain,2026:missing"
_CORE = "tag:yaml.org,2002:"
_RESOLVERS: tuple[tuple[str, str, str], ...] = (
    (_CORE + "bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    (_CORE + "null", r"^(?:~|null|Null|NULL|)$", "~nN\0"),
    (_CORE + "int", r"^[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F_]+|0o[0-7_]+)$", "-+0123456789"),
    (
        _CORE + "float",
        r"^(?:[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9_]*)?)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
        "-+.0123456789",
    ),
    (_CORE + "merge", r"^<<$", "<"),
    (MISSING, r"^\?\?\?$", "?"),
)


class Loader(yaml.SafeLoader):
    """Composes YAML with the scalars of YAML 1.2 and OmegaConf's ``???`` for "must be given"."""


class Dumper(yaml.SafeDumper):
    """Writes what Loader reads back unchanged, and readers of YAML 1.1 as well."""


Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in _RESOLVERS:
    for _class in (Loader, Dumper):
        _class.add_implicit_resolver(
            _tag, re.compile(_pattern), ["" if c == "\0" else c for c in _first]
        )


def _text(dumper: Dumper, text: str) -> yaml.ScalarNode:
    """Line breaks other than \\n survive in double quotes only."""
    style = '"' if re.search("[\r\x85\u2028\u2029]", text) else None
    return dumper.represent_scalar(_CORE + "str", text, style=style)


Dumper.add_representer(str, _text)

Scalar = str | int | float | bool | None
Value = Any
"""What a node holds: a Scalar, ``dict[str, Node]``, ``list[Node]``, or a ready-made object."""


@dataclass(frozen=True)
class Node:
    """A value of the configuration and where it comes from.

    raw: the text of a plain scalar as written. missing: written ``???``. unset: a null that
    took back an inherited value. loose: not typed by the user as YAML in a file (a command-line
    override or an interpolation), so that text and numbers are told apart by the key's type.
    """

    value: Value
    mark: Mark | None = None
    raw: str | None = None
    missing: bool = False
    unset: bool = False
    loose: bool = False


def wrap(value: Any, mark: Mark | None = None, *, loose: bool = False) -> Node:
    """Plain Python data as a tree of nodes; keys become text, tuples lists."""
    if isinstance(value, Mapping):
        value = {str(k): wrap(v, mark, loose=loose) for k, v in value.items()}
    elif isinstance(value, list | tuple):
        value = [wrap(v, mark, loose=loose) for v in value]
    return Node(value, mark, loose=loose)


def unwrap(node: Node) -> Any:
    """The tree below ``node`` as plain Python data."""
    if isinstance(node.value, dict):
        return {key: unwrap(child) for key, child in node.value.items()}
    if isinstance(node.value, list):
        return [unwrap(child) for child in node.value]
    return node.value


def read_text(path: str | os.PathLike[str], shown: str, faults: list[Fault]) -> str | None:
    """Text of a configuration file; a fault and None when it cannot be read as such."""
    mark = Mark(shown)
    try:
        if os.path.isdir(path):
            inside = FilePath(path) / "config.yaml"
            hint = f"; did you mean {inside}?" if inside.is_file() else "; name the YAML file in it"
            faults.append(Fault((), f"is a folder, not a configuration file{hint}", mark))
            return None
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        faults.append(Fault((), f"no such configuration file; {_nearby(path)}", mark))
        return None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        faults.append(Fault((), f"cannot be read ({reason}); check the path and its rights", mark))
        return None
    if len(data) > MAX_BYTES or b"\0" in data:
        what = "a binary file" if b"\0" in data else f"over {MAX_BYTES >> 20} MiB"
        faults.append(Fault((), f"is {what}, not a configuration; name a YAML file", mark))
        return None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        faults.append(Fault((), "is not UTF-8 text; save it as UTF-8", Mark(shown, line)))
        return None


def _nearby(path: str | os.PathLike[str]) -> str:
    """A hint for a file that is not there: a similar name in its folder."""
    wanted = FilePath(path)
    try:
        names = [p.name for p in wanted.parent.iterdir() if p.suffix in (".yaml", ".yml")]
    except OSError:
        return f"the folder {wanted.parent} does not exist either"
    return did_you_mean(wanted.name, names, otherwise="check the path")


def parse(text: str, shown: str, faults: list[Fault], *, numbered: bool = True) -> Node | None:
    """Compose one YAML document; faults carry file and line. Empty text gives a null node.

    numbered: False for text that is not a file, whose lines mean nothing to the user.
    """
    composer = _Composer(shown, faults, numbered)
    try:
        loader = Loader(text)
        try:
            root = loader.get_single_node()
        finally:
            loader.dispose()
        return Node(None, Mark(shown)) if root is None else composer.convert(root, ())
    except yaml.MarkedYAMLError as error:
        where = error.problem_mark or error.context_mark
        mark = Mark(shown, where.line + 1 if where and numbered else None)
        faults.append(Fault((), _syntax(error), mark))
    except yaml.YAMLError as error:
        reason = getattr(error, "reason", None) or "unreadable character"
        position = getattr(error, "position", None)
        line = text[:position].count("\n") + 1 if isinstance(position, int) and numbered else None
        faults.append(Fault((), f"is not valid YAML ({reason}); remove it", Mark(shown, line)))
    except RecursionError:
        faults.append(Fault((), "is nested too deeply; flatten it", Mark(shown)))
    except _TooLarge:
        limit = f"holds more than {MAX_NODES} values (aliases count each time); shorten it"
        faults.append(Fault((), limit, Mark(shown)))
    return None


def _syntax(error: yaml.MarkedYAMLError) -> str:
    """One sentence for a syntax error, with what usually causes it."""
    problem = (error.problem or error.context or "syntax error").strip()
    if "'\\t'" in problem:
        remedy = "indent with spaces, not tabs"
    elif "mapping values are not allowed" in problem:
        remedy = "put a value that contains ': ' in quotes, and check the indentation"
    elif "expected a single document" in problem or "another document" in problem:
        remedy = "keep one document in a file, without '---' between"
    elif "could not find expected ':'" in problem:
        remedy = "write 'key: value', with a space behind the colon"
    elif "alias" in problem:
        remedy = "put text that begins with * or & in quotes"
    else:
        remedy = "check indentation, quotes and brackets"
    return f"is not valid YAML ({problem}); {remedy}"


class _TooLarge(Exception):
    """The document grows beyond MAX_NODES."""


class _Composer:
    """Turns composed YAML nodes into ours."""

    def __init__(self, shown: str, faults: list[Fault], numbered: bool) -> None:
        self.shown, self.faults, self.numbered = shown, faults, numbered
        self.count = 0
        self.open: list[yaml.Node] = []

    def mark(self, node: yaml.Node) -> Mark:
        """File and line where ``node`` begins."""
        return Mark(self.shown, node.start_mark.line + 1 if self.numbered else None)

    def fault(self, node: yaml.Node, path: tuple[str, ...], message: str) -> None:
        """Note a fault at ``node``."""
        self.faults.append(Fault(path, message, self.mark(node)))

    def convert(self, node: yaml.Node, path: tuple[str, ...]) -> Node:
        """A composed node as ours; faults are noted and leave a null."""
        self.count += 1
        if self.count > MAX_NODES:
            raise _TooLarge
        if any(node is parent for parent in self.open):
            self.fault(node, path, "an alias contains itself; write the value out")
            return Node(None, self.mark(node))
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, path)
        if node.tag not in (_CORE + "map", _CORE + "seq"):
            self.fault(node, path, f"the tag {node.tag!r} is not supported; write plain data")
            return Node(None, self.mark(node))
        self.open.append(node)
        try:
            if isinstance(node, yaml.MappingNode):
                return self._mapping(node, path)
            items = [self.convert(c, (*path, str(i))) for i, c in enumerate(node.value)]
            return Node(items, self.mark(node))
        finally:
            self.open.pop()

    def _mapping(self, node: yaml.MappingNode, path: tuple[str, ...]) -> Node:
        inherited: dict[str, Node] = {}
        own: dict[str, Node] = {}
        for key, child in node.value:
            if key.tag == _CORE + "merge":
                self._merge(child, path, inherited)
                continue
            if not isinstance(key, yaml.ScalarNode):
                self.fault(key, path, "a key must be plain text; write 'key: value'")
                continue
            name = str(key.value)
            if name in own:
                first = own[name].mark
                line = f" (first on line {first.line})" if first and first.line else ""
                self.fault(key, (*path, name), f"is given twice{line}; keep one")
                continue
            own[name] = replace(self.convert(child, (*path, name)), mark=self.mark(key))
        return Node({**inherited, **own}, self.mark(node))

    def _merge(self, child: yaml.Node, path: tuple[str, ...], into: dict[str, Node]) -> None:
        """``<<: *alias`` or ``<<: [*a, *b]``: earlier ones win, as YAML says."""
        parts: Sequence[yaml.Node] = [child]
        if isinstance(child, yaml.SequenceNode):
            parts = child.value
        for part in parts:
            if not isinstance(part, yaml.MappingNode):
                self.fault(part, path, "'<<' merges mappings only; give it an alias of one")
                continue
            merged = self.convert(part, path).value
            into.update({k: v for k, v in (merged or {}).items() if k not in into})

    def _scalar(self, node: yaml.ScalarNode, path: tuple[str, ...]) -> Node:
        text, mark = str(node.value), self.mark(node)
        raw = text if node.style is None else None
        kind = node.tag.removeprefix(_CORE)
        try:
            if node.tag == MISSING:
                return Node(None, mark, missing=True)
            if kind in ("null", "merge"):
                return Node(None if kind == "null" else text, mark, raw)
            if kind == "bool":
                return Node(_WORDS[text.lower()], mark, raw)
            if kind == "int":
                return Node(int(text.replace("_", ""), 0), mark, raw)
            if kind == "float":
                return Node(_float(text), mark, raw)
            if kind == "str":
                return Node(text, mark, raw)
        except (ValueError, KeyError):
            self.fault(node, path, f"{text[:60]!r} is not a valid {kind}; correct it")
            return Node(None, mark)
        self.fault(node, path, f"the tag {node.tag!r} is not supported; write plain data")
        return Node(None, mark)


_WORDS = {"true": True, "false": False, "yes": True, "no": False, "on": True, "off": False}


def _float(text: str) -> float:
    """YAML float syntax: underscores, .inf and .nan."""
    plain = text.replace("_", "").lower()
    if plain.lstrip("+-") in (".inf", ".nan"):
        plain = plain.replace(".", "", 1)
    return float(plain)


def scalar(text: str) -> Scalar:
    """The value that ``text`` has as a plain YAML scalar; the text itself when it is a word."""
    faults: list[Fault] = []
    node = parse(text, "", faults, numbered=False)
    if node is None or faults or isinstance(node.value, dict | list):
        return text
    value: Scalar = node.value
    return value
