"""The builtin corpus: text that every Python installation carries, so nothing is downloaded.

Domains: ``code`` is the standard library's source, ``docs`` its documentation topics and
docstrings, ``math`` generated worked arithmetic. The content is a function of the Python version
(a distribution that leaves out the library's own tests has less code). A module's code and
docstrings share a split key, so that what is held out in one domain is not trained on in the other.
"""

from __future__ import annotations

import ast
import gc
import importlib
import os
import platform
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any

from llmtrain.config.schema import TextSourceConfig
from llmtrain.data.sources.arithmetic import page
from llmtrain.data.sources.base import Bad, Document, TextSource
from llmtrain.errors import DataError

MATH_BYTES = 4_000_000  # of the endless domain math, unless max_bytes says otherwise

# Not of this Python alone, generated tables, the text of the domain docs, or broken on purpose.
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "pydoc_data", "encodings"}
_SKIPPED_STARTS = ("config-", "_sysconfigdata", "badsyntax_", "bad_coding")
_TESTS = {"test", "tests", "idle_test"}

_Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


class BuiltinSource(TextSource):
    """One domain of the builtin corpus."""

    def __init__(self, name: str, cfg: TextSourceConfig) -> None:
        super().__init__(name, cfg)
        makers = {"code": _code, "docs": _docs, "math": _math}
        if cfg.domain not in makers:
            raise DataError(f"source {name!r} of kind builtin needs a domain: code, docs or math")
        self._documents = makers[cfg.domain]
        limit = cfg.max_bytes
        if cfg.domain == "math" and limit is None and cfg.max_documents is None:
            limit = MATH_BYTES
        self._limit = limit
        self.total_bytes = limit

    def parts(self) -> Sequence[str]:
        return [str(self.cfg.domain)]

    def identity(self) -> dict[str, Any]:
        if self.cfg.domain == "math":
            return {}
        return {"python": platform.python_version()}

    def records(self, part: str) -> Iterator[Document | Bad]:
        size = 0
        for document in self._documents():
            size += len(document.text.encode())
            self.bytes_read = size
            yield document
            if self._limit is not None and size >= self._limit:
                return


def library_files() -> list[tuple[str, str]]:
    """(name within the library, path) of its modules: the library proper first, then its tests."""
    root = sysconfig.get_path("stdlib")
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [d for d in folders if not _skipped(d, _SKIPPED_FOLDERS)]
        for name in names:
            if name.endswith(".py") and not _skipped(name, set()):
                path = os.path.join(folder, name)
                found.append((os.path.relpath(path, root).replace(os.sep, "/"), path))
    return sorted(found, key=lambda item: (_is_test(item[0]), item[0]))


def _skipped(name: str, folders: set[str]) -> bool:
    return name in folders or (name.startswith(_SKIPPED_STARTS) and not name.startswith("__"))


def _is_test(name: str) -> bool:
    return not _TESTS.isdisjoint(name.split("/")[:-1])


def _sources() -> Iterator[tuple[str, str]]:
    """(name, text) of the library's modules; those not in UTF-8 are tests of other encodings."""
    for name, path in library_files():
        try:
            with open(path, encoding="utf-8", newline="") as file:
                text = file.read()
        except UnicodeDecodeError:
            continue
        if text.strip():
            yield name, text


def _code() -> Iterator[Document]:
    for name, text in _sources():
        yield Document(text, name, 1, split_key=name)


def _math() -> Iterator[Document]:
    for index in count():
        yield Document(page(index), "arithmetic", index + 1)


def _docs() -> Iterator[Document]:
    """Reference topics, then one page per module: its docstrings under their signatures."""
    try:
        topics = dict(importlib.import_module("pydoc_data.topics").topics)
    except ImportError:
        topics = {}  # a distribution may split it off
    for number, name in enumerate(sorted(topics), 1):
        yield Document(topics[name], "pydoc topics", number)
    for name, text in _sources():
        body = docstrings(name, text)
        if body:
            yield Document(body, name, 1, split_key=name)


def docstrings(name: str, text: str) -> str:
    """The docstrings in module source ``text`` as one page; empty if there are none."""
    with warnings.catch_warnings(), _no_collection():
        warnings.simplefilter("ignore")  # invalid escapes in tests of the parser
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError, RecursionError):
            return ""
        parts = []
        head = ast.get_docstring(tree)
        if head:
            parts.append(head)
        parts.extend(_described(tree, ""))
    if not parts:
        return ""
    module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    return f"Module {module}\n\n" + "\n\n".join(parts) + "\n"


def _described(parent: ast.Module | _Definition, prefix: str) -> Iterator[str]:
    for node in parent.body:
        if not isinstance(node, _Definition):
            continue
        full = f"{prefix}{node.name}"
        if text := ast.get_docstring(node):
            indented = "\n".join(f"    {line}".rstrip() for line in text.splitlines())
            yield f"{_signature(node, full)}\n{indented}"
        if isinstance(node, ast.ClassDef):
            yield from _described(node, f"{full}.")


def _signature(node: _Definition, full: str) -> str:
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        return f"class {full}({bases})" if bases else f"class {full}"
    start = "async " if isinstance(node, ast.AsyncFunctionDef) else ""
    return f"{start}{full}({ast.unparse(node.args)})"


@contextmanager
def _no_collection() -> Iterator[None]:
    """Syntax trees hold no cycles; collecting while they grow takes half of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
