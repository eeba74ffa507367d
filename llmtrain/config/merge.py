"""From files to one tree: ``base`` inheritance, command-line overrides, interpolation.

Later layers win: the files under ``base`` in their order, the file itself, the overrides.
Mappings merge key by key, everything else replaces. A null over an inherited value takes it
back: an optional key becomes null, any other returns to its default, an entry disappears.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path as FilePath
from typing import Any

from llmtrain.config.faults import Fault, Mark, Path
from llmtrain.config.yamlfile import Node, parse, read_text, unwrap, wrap
from llmtrain.errors import secrets_in

COMMAND_LINE = "command line"


def merge(base: Node | None, top: Node) -> Node:
    """``top`` laid over ``base``."""
    if base is None:
        return top
    if isinstance(base.value, dict) and isinstance(top.value, dict):
        merged = dict(base.value)
        for key, child in top.value.items():
            merged[key] = merge(merged.get(key), child)
        return replace(top, value=merged)
    if top.value is None and not top.missing:
        return replace(top, unset=True)
    return top


class Files:
    """Reads a configuration file and the files it is based on, each once."""

    def __init__(self, faults: list[Fault]) -> None:
        self.faults = faults
        self._done: dict[str, Node] = {}

    def tree(self, path: FilePath, shown: str, parents: tuple[str, ...] = ()) -> Node:
        """The merged tree of ``path``; an empty mapping where it could not be read.

        shown: the file's name for messages. parents: real paths of the files that lead here.
        """
        real = _real(path)
        if real in self._done:
            return self._done[real]
        node = self._own(path, shown)
        base = node.value.pop("base", None)
        merged = Node({}, Mark(shown))
        for name, mark in self._base_names(base):
            child = FilePath(os.path.normpath(FilePath(shown).parent / FilePath(name).expanduser()))
            chain = (*parents, real)
            if _real(child) in chain:
                loop = " -> ".join(FilePath(p).name for p in (*chain, str(child)))
                message = f"files are based on each other in a circle ({loop}); break it"
                self.faults.append(Fault(("base",), message, mark))
            elif not os.path.exists(child):
                message = f"there is no file {child}; paths are relative to the file with `base`"
                self.faults.append(Fault(("base",), message, mark))
            else:
                merged = merge(merged, self.tree(child, str(child), chain))
        self._done[real] = merge(merged, node)
        return self._done[real]

    def _own(self, path: FilePath, shown: str) -> Node:
        """The mapping written in one file."""
        text = read_text(path, shown, self.faults)
        node = parse(text, shown, self.faults) if text is not None else None
        if node is None or node.value is None:
            return Node({}, Mark(shown))
        if not isinstance(node.value, dict):
            kind = "a list" if isinstance(node.value, list) else "a single value"
            message = f"must hold 'key: value' lines, not {kind}"
            self.faults.append(Fault((), message, node.mark))
            return Node({}, Mark(shown))
        return replace(node, value=dict(node.value))

    def _base_names(self, base: Node | None) -> list[tuple[str, Mark | None]]:
        """The entries under ``base``, with a fault for each that is no file name."""
        if base is None or base.value is None:
            return []
        entries = base.value if isinstance(base.value, list) else [base]
        good = [(e.value, e.mark) for e in entries if isinstance(e.value, str) and e.value]
        if len(good) < len(entries):
            message = "must be a list of file names, such as [common.yaml]"
            self.faults.append(Fault(("base",), message, base.mark))
        return good


def _real(path: FilePath) -> str:
    """One name for one file, however it is reached; reading reports what is no path at all."""
    try:
        return os.path.realpath(path)
    except (OSError, ValueError):
        return str(path)


def apply_overrides(
    root: Node, overrides: Sequence[str], defaults: dict[str, Any], faults: list[Fault]
) -> Node:
    """Lay ``key.path=value`` texts over ``root``; values are YAML, numbers in paths list items.

    defaults: the whole tree of defaults, so that an item of a default list can be replaced.
    """
    for text in overrides:
        key, sign, value = text.partition("=")
        mark = Mark(COMMAND_LINE)
        path = tuple(key.strip().split("."))
        if not sign or not all(path):
            message = f"{text!r} is not an override; write key=value, such as train.duration=50step"
            faults.append(Fault((), message, mark))
        elif path[0] == "base":
            message = "is read from files only; pass the keys themselves"
            faults.append(Fault(path, message, mark))
        else:
            node = _override_value(value, path, mark, faults)
            if node is not None:
                root = _put(root, path, (), node, defaults, faults)
    return root


def _override_value(value: str, path: Path, mark: Mark, faults: list[Fault]) -> Node | None:
    """The value of an override. Text that is no YAML (a glob, say) is taken as it is."""
    own: list[Fault] = []
    node = parse(value, COMMAND_LINE, own, numbered=False)
    if node is None and value.lstrip()[:1] in "*&%@`!|>":
        return Node(value, mark, loose=True)
    faults.extend(replace(f, path=(*path, *f.path)) for f in own)
    return None if node is None or own else _loosen(node, mark)


def _loosen(node: Node, mark: Mark) -> Node:
    """Mark a tree as written on the command line."""
    value = node.value
    if isinstance(value, dict):
        value = {k: _loosen(v, mark) for k, v in value.items()}
    elif isinstance(value, list):
        value = [_loosen(v, mark) for v in value]
    return replace(node, value=value, mark=mark, loose=True)


def _put(
    here: Node | None,
    path: Path,
    done: Path,
    value: Node,
    defaults: Any,
    faults: list[Fault],
) -> Node:
    """``here`` with ``value`` laid over what is at ``path``; ``done`` leads to ``here``."""
    if not path:
        return merge(here, value)
    key, rest = path[0], path[1:]
    if (here is None or here.value is None) and isinstance(defaults, list):
        here = wrap(defaults, value.mark)
    if here is not None and isinstance(here.value, list):
        items, size = list(here.value), len(here.value)
        if not key.isdecimal() or int(key) > size:
            have = f"items 0 to {size - 1}" if size else "no items"
            message = f"is a list with {have}; {size} appends one, not {key!r}"
            faults.append(Fault(done, message, value.mark))
            return here
        child = items[int(key)] if int(key) < size else None
        items[int(key) : int(key) + 1] = [_put(child, rest, (*done, key), value, None, faults)]
        return replace(here, value=items)
    old = here.value if here is not None and isinstance(here.value, dict) else {}
    for length in range(len(path), 1, -1):
        if ".".join(path[:length]) in old:  # a name that holds dots, such as a source wiki.en
            key, rest = ".".join(path[:length]), path[length:]
            break
    below = defaults.get(key) if isinstance(defaults, dict) else None
    child = _put(old.get(key), rest, (*done, key), value, below, faults)
    mark = here.mark if here is not None and here.value is old else value.mark
    return Node({**old, key: child}, mark)


def interpolate(root: Node, defaults: dict[str, Any], faults: list[Fault]) -> Node:
    """Replace ``${...}`` through OmegaConf; references to unset keys see the defaults.

    A value that holds a secret of the environment is a fault, whoever put it there: the shell too.
    """
    root = _without_secrets(root, (), faults)
    if not _has_interpolation(root):
        return root
    from omegaconf import OmegaConf

    root = _check_grammar(root, (), faults)
    tree = OmegaConf.create(_over(defaults, unwrap(root)))
    return _resolve(root, tree, (), faults)


def _has_interpolation(node: Node) -> bool:
    if isinstance(node.value, dict):
        return any(_has_interpolation(child) for child in node.value.values())
    if isinstance(node.value, list):
        return any(_has_interpolation(child) for child in node.value)
    return isinstance(node.value, str) and "${" in node.value


def _check_grammar(node: Node, path: Path, faults: list[Fault]) -> Node:
    """``node`` without the texts that OmegaConf cannot even read."""
    if isinstance(node.value, dict):
        children = {k: _check_grammar(v, (*path, k), faults) for k, v in node.value.items()}
        return replace(node, value=children)
    if isinstance(node.value, list):
        items = [_check_grammar(v, (*path, str(i)), faults) for i, v in enumerate(node.value)]
        return replace(node, value=items)
    if isinstance(node.value, str) and "${" in node.value:
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException

        try:
            OmegaConf.create([node.value])
        except OmegaConfBaseException as error:
            return _unresolved(node, path, error, faults)
    return node


def _unresolved(node: Node, path: Path, error: Exception, faults: list[Fault]) -> Node:
    """Notes a fault for an interpolation; the key goes on as null."""
    reason = str(error).partition("\n")[0] or "it refers to itself"
    message = f"{node.value!r} cannot be resolved ({reason}); correct it, or write \\${{"
    faults.append(Fault(path, message, node.mark))
    return replace(node, value=None)


def _over(base: Any, top: Any) -> Any:
    """Plain ``top`` over plain ``base``, mappings key by key."""
    if isinstance(base, dict) and isinstance(top, dict):
        return {**base, **{k: _over(base.get(k), v) for k, v in top.items()}}
    return top


def _resolve(node: Node, tree: Any, path: Path, faults: list[Fault]) -> Node:
    if isinstance(node.value, dict):
        children = {k: _resolve(v, tree, (*path, k), faults) for k, v in node.value.items()}
        return replace(node, value=children)
    if isinstance(node.value, list):
        items = [_resolve(v, tree, (*path, str(i)), faults) for i, v in enumerate(node.value)]
        return replace(node, value=items)
    if not isinstance(node.value, str) or "${" not in node.value:
        return node
    from omegaconf import Container, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        found = tree
        for part in path:
            found = found[int(part)] if OmegaConf.is_list(found) else found[part]
        if isinstance(found, Container):
            found = OmegaConf.to_container(found, resolve=True)
    except (OmegaConfBaseException, RecursionError) as error:
        return _unresolved(node, path, error, faults)
    return _without_secrets(wrap(found, node.mark, loose=True), path, faults)


def _without_secrets(node: Node, path: Path, faults: list[Fault]) -> Node:
    if isinstance(node.value, dict):
        children = {k: _without_secrets(v, (*path, k), faults) for k, v in node.value.items()}
        return replace(node, value=children)
    if isinstance(node.value, list):
        items = [_without_secrets(v, (*path, str(i)), faults) for i, v in enumerate(node.value)]
        return replace(node, value=items)
    secret = next(secrets_in(node.value), None) if isinstance(node.value, str) else None
    if secret is None:
        return node
    message = (
        f"holds the secret in ${secret[0]}, and configs are written into runs and checkpoints; let "
        "what needs it read the environment itself"
    )
    faults.append(Fault(path, message, node.mark))
    return replace(node, value=None)


def escape(text: str) -> str:
    """``text`` so that interpolation gives it back unchanged."""
    return re.sub(r"(\\*)\$\{", lambda m: m.group(1) * 2 + r"\${", text)
