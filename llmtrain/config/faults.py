"""Faults of a configuration: collected one by one, reported all together."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from llmtrain.errors import ConfigError

Path = tuple[str, ...]


@dataclass(frozen=True)
class Mark:
    """Where the user wrote something: a file (as the user named it) and line, counted from 1."""

    file: str
    line: int | None = None

    def __str__(self) -> str:
        return self.file if self.line is None else f"{self.file}:{self.line}"


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong.

    path: the key it is reported under, () for a whole file. message: what is wrong; remedy.
    mark: where it was written, if known. depends: other keys that take part in the rule.
    """

    path: Path
    message: str
    mark: Mark | None = None
    depends: tuple[Path, ...] = field(default=())

    def __str__(self) -> str:
        where = [str(self.mark)] if self.mark else []
        key = [".".join(self.path)] if self.path else []
        return ": ".join([*where, *key, self.message])


class Collector:
    """Gathers faults of rules between keys."""

    def __init__(self) -> None:
        self.found: list[Fault] = []

    def add(self, path: str | Path, message: str, *depends: str | Path) -> None:
        """Note a fault under ``path``; ``depends`` are the other keys that the rule looks at."""
        self.found.append(Fault(_split(path), message, depends=tuple(_split(d) for d in depends)))


def _split(path: str | Path) -> Path:
    return tuple(path.split(".")) if isinstance(path, str) else path


def raise_faults(faults: Sequence[Fault]) -> None:
    """Raise one ConfigError that lists all ``faults``, in the order of files and lines."""
    if not faults:
        return
    files = list(dict.fromkeys(f.mark.file for f in faults if f.mark))

    def position(fault: Fault) -> tuple[int, int]:
        if fault.mark is None:
            return len(files), 0
        return files.index(fault.mark.file), fault.mark.line or 0

    lines = list(dict.fromkeys(str(f) for f in sorted(faults, key=position)))
    if len(lines) == 1:
        raise ConfigError(lines[0])
    raise ConfigError("\n  ".join([f"{len(lines)} faults in the configuration:", *lines]))


def nearest(word: str, known: Iterable[object]) -> str | None:
    """The known word that ``word`` is most probably a misspelling of, if any."""
    words = {str(k).lower(): str(k) for k in known}
    near = difflib.get_close_matches(word.lower(), list(words), n=1, cutoff=0.6)
    return words[near[0]] if near else None


def did_you_mean(word: str, known: Iterable[object], otherwise: str = "") -> str:
    """``did you mean 'x'?`` for the known word nearest to ``word``, else ``otherwise``."""
    near = nearest(word, known)
    return f"did you mean {near!r}?" if near else otherwise


def listing(known: Iterable[object]) -> str:
    """Known words as a list for a sentence; None is written as YAML writes it."""
    return ", ".join("null" if k is None else str(k) for k in known)
