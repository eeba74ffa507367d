"""Reading the folder of a run, finished or not.

A run that was killed may end in half a line, a run that has just begun may have no line at all,
and files may be missing: everything readable is taken, and what could not be read is counted.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmtrain.errors import DataError

Record = dict[str, Any]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Series:
    """Points of a curve. x: tokens (or samples), y: values; both [n] float64 and finite."""

    x: Floats
    y: Floats

    def __len__(self) -> int:
        return len(self.x)


@dataclass(frozen=True)
class Run:
    """What a run's folder says.

    steps, evals, numerics: records in order of their step, one per step. samples, events: records
    as written. config: the YAML text. plan: ``plan.json``. unigram, unigram_loss: domain -> nats
    per token of its held-out text by token frequencies alone, its own (the entropy, which no
    model without context goes below) or the training text's. unreadable: lines left out.
    """

    path: Path
    name: str
    steps: list[Record] = field(default_factory=list)
    evals: list[Record] = field(default_factory=list)
    samples: list[Record] = field(default_factory=list)
    events: list[Record] = field(default_factory=list)
    numerics: list[Record] = field(default_factory=list)
    config: str = ""
    plan: Record = field(default_factory=dict)
    unigram: dict[str, float] = field(default_factory=dict)
    unigram_loss: dict[str, float] = field(default_factory=dict)
    unreadable: int = 0

    @property
    def sources(self) -> list[str]:
        """Names of the training sources, in order of appearance."""
        return _names(self.steps, "sources")

    @property
    def methods(self) -> list[str]:
        """Names of methods' own numbers in the step records."""
        return _names(self.steps, "method")

    @property
    def domains(self) -> list[str]:
        """Names of the held-out domains, in order of appearance."""
        return _names(self.evals, "domains")

    def curve(self, *keys: str) -> Series:
        """A number of the step records against tokens. keys: nested, e.g. sources, code, loss."""
        return series(self.steps, *keys)

    def heldout(self, domain: str, key: str = "loss") -> Series:
        """A number of the evaluations of ``domain`` against tokens."""
        return series(self.evals, "domains", domain, key)


def number(value: Any) -> float:
    """``value`` as a float; NaN where it is missing, no number, or beyond any float32."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return math.nan
    try:
        found = float(value)
    except (ValueError, OverflowError):
        return math.nan
    return found if abs(found) < 1e39 else math.nan


def lookup(record: Any, *keys: str) -> Any:
    """The value under nested keys, or None."""
    value: Any = record
    for key in keys:
        if not isinstance(value, dict):
            return None
        value = value.get(key)
    return value


def series(records: Sequence[Record], *keys: str, x: str = "tokens") -> Series:
    """Values under ``keys`` against ``x``; records where either is not finite are left out."""
    pairs = np.array(
        [(number(r.get(x)), number(lookup(r, *keys))) for r in records], dtype=np.float64
    ).reshape(-1, 2)
    pairs = pairs[np.isfinite(pairs).all(axis=1)]
    return Series(pairs[:, 0], pairs[:, 1])


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Read several runs under names that tell them apart; DataError for what is no run."""
    runs = [read_run(path) for path in paths]
    return [
        replace(run, name=name)
        for run, name in zip(runs, _distinct([run.path for run in runs]), strict=True)
    ]


def read_run(path: Path) -> Run:
    """Read one run; DataError when ``path`` is not the folder of a run."""
    metrics, config = path / "metrics.jsonl", path / "config.yaml"
    if not path.is_dir():
        raise DataError(f"{path}: no such run folder; give the folder that training printed")
    if (path / "sequence.json").is_file():
        raise DataError(
            f"{path}: a sequence of tasks, whose report is {path / 'report.html'}; for those of "
            "its runs give their folders below it"
        )
    if not metrics.is_file() and not config.is_file():
        raise DataError(
            f"{path}: neither metrics.jsonl nor config.yaml is there, so this is not the folder "
            "of a run; give OUT/NAME of its config"
        )
    records, unreadable = _read_records(metrics)
    text = _read_text(config)
    manifest = _manifest(path, text)
    kinds: dict[str, list[Record]] = {
        kind: [r for r in records if r.get("kind") == kind]
        for kind in ("step", "eval", "eval_of", "sample", "event", "numerics")
    }
    return Run(
        path=path,
        name=path.resolve().name,
        steps=_in_order(kinds["step"]),
        evals=_with_averages(_in_order(kinds["eval"]), kinds["eval_of"]),
        samples=kinds["sample"],
        events=kinds["event"],
        numerics=_in_order(kinds["numerics"]),
        config=text,
        plan=_read_json(path / "plan.json"),
        unigram=_by_domain(manifest, "unigram_entropy_nats"),
        unigram_loss=_by_domain(manifest, "unigram_loss_nats"),
        unreadable=unreadable,
    )


def parse_config(text: str) -> Record:
    """The config's YAML as a mapping; empty where it cannot be parsed."""
    import yaml

    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError:
        return {}
    return tree if isinstance(tree, dict) else {}


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error


def _read_json(path: Path) -> Record:
    try:
        tree = json.loads(_read_text(path) or "{}")
    except ValueError:
        return {}
    return tree if isinstance(tree, dict) else {}


def _read_records(path: Path) -> tuple[list[Record], int]:
    """All records that parse, and the number of lines that do not."""
    records: list[Record] = []
    unreadable = 0
    for line in _read_text(path).split("\n"):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:
            unreadable += 1
            continue
        step = record.get("step") if isinstance(record, dict) else None
        if isinstance(step, int) and abs(step) < 1 << 62:
            records.append(record)
        else:
            unreadable += 1
    return records, unreadable


def _in_order(records: list[Record]) -> list[Record]:
    """Where the steps go back (a resume that could not drop lines), the later lines count."""
    kept: list[Record] = []
    for record in records:
        while kept and kept[-1]["step"] >= record["step"]:
            kept.pop()
        kept.append(record)
    return kept


def _with_averages(evals: list[Record], averages: list[Record]) -> list[Record]:
    """Evaluations with the domains of averaged weights, measured at the same step, beside them."""
    beside = {record["step"]: record for record in averages}
    out = []
    for record in evals:
        other = beside.get(record["step"], {})
        own, found = record.get("domains"), other.get("domains")
        if isinstance(own, dict) and isinstance(found, dict):
            named = {f"{name} ({other.get('weights')})": value for name, value in found.items()}
            out.append({**record, "domains": {**own, **named}})
        else:
            out.append(record)
    return out


def _names(records: Sequence[Record], key: str) -> list[str]:
    names: dict[str, None] = {}
    for record in records:
        found = record.get(key)
        if isinstance(found, dict):
            names.update(dict.fromkeys(found))
    return list(names)


def _distinct(paths: Sequence[Path]) -> list[str]:
    """The shortest path endings that tell the runs apart; numbered when it is the same run."""
    parts = [path.resolve().parts for path in paths]
    for depth in range(1, max(map(len, parts), default=1) + 1):
        names = ["/".join(p[-depth:]).replace("//", "/") for p in parts]
        if len(set(names)) == len(names):
            return names
    names = [path.resolve().name for path in paths]
    return [f"{name} ({i})" for i, name in enumerate(names, 1)]


def _manifest(run: Path, config: str) -> Record:
    """The manifest of the run's corpus, where the corpus is still in reach; else empty."""
    corpus = lookup(parse_config(config), "data", "corpus")
    if not isinstance(corpus, str) or not corpus:
        return {}
    for base in (Path(), *run.resolve().parents):
        manifest = base / corpus / "manifest.json"
        if manifest.is_file():
            return _read_json(manifest)
    return {}


def _by_domain(manifest: Record, key: str) -> dict[str, float]:
    """A number of each source's held-out text."""
    sources = manifest.get("sources")
    entries = sources.items() if isinstance(sources, dict) else ()
    found = {name: number(lookup(entry, "heldout", key)) for name, entry in entries}
    return {name: value for name, value in found.items() if math.isfinite(value)}
