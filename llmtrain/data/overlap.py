"""Benchmark text that occurs in training data, by n-grams of words.

After the 13-grams of GPT-3 (Brown et al. 2020, appendix C): an item of a benchmark is touched when
a run of ``n`` of its words, in lower case and without punctuation, stands in the data.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmtrain.data.words import Hasher, Stream, ngrams
from llmtrain.errors import DataError


@dataclass(frozen=True)
class Overlap:
    """Of one benchmark file. items: long enough to compare; short: the others.

    touched: items of which an n-gram occurs; whole: items of which all do. grams, found: different
    n-grams, and those that occur. documents: by stream, documents that hold one.
    """

    name: str
    items: int
    short: int
    touched: int
    whole: int
    grams: int
    found: int
    documents: list[int]


@dataclass
class _Benchmark:
    """A file's n-grams: sorted and distinct, and by item."""

    name: str
    grams: NDArray[np.uint64]
    by_item: list[NDArray[np.uint64]]
    short: int
    seen: NDArray[np.bool_]
    documents: list[int]


def check_benchmarks(files: Sequence[Path], n: int) -> None:
    """Raise the DataError that ``find_overlap`` would, before anything long is begun."""
    for file in files:
        _read(file, n, Hasher(), 0)


def find_overlap(streams: Sequence[Stream], files: Sequence[Path], n: int) -> list[Overlap]:
    """Look for every benchmark's n-grams in the documents of all ``streams``.

    Memory: 8 bytes for each n-gram of the benchmarks. Raises DataError for a file that cannot be
    read or has no item of ``n`` words.
    """
    hasher = Hasher()
    benchmarks = [_read(file, n, hasher, len(streams)) for file in files]
    for s, stream in enumerate(streams):
        for start, stop in stream.spans():
            found = np.unique(ngrams(hasher.document(stream, start, stop), n))
            for one in benchmarks:
                place = np.searchsorted(one.grams, found)
                hit = place[one.grams[np.minimum(place, len(one.grams) - 1)] == found]
                if len(hit):
                    one.seen[hit] = True
                    one.documents[s] += 1
    return [_result(one) for one in benchmarks]


def _read(file: Path, n: int, hasher: Hasher, streams: int) -> _Benchmark:
    by_item, short = [], 0
    for text in items(file):
        grams = np.unique(ngrams(hasher.text(text), n))
        if len(grams):
            by_item.append(grams)
        else:
            short += 1
    if not by_item:
        raise DataError(
            f"--benchmark {file}: no item has {n} words; lower --ngram, or give another file"
        )
    grams = np.unique(np.concatenate(by_item))
    return _Benchmark(file.name, grams, by_item, short, np.zeros(len(grams), bool), [0] * streams)


def _result(one: _Benchmark) -> Overlap:
    touched = whole = 0
    for grams in one.by_item:
        seen = one.seen[np.searchsorted(one.grams, grams)]
        touched += bool(seen.any())
        whole += bool(seen.all())
    return Overlap(
        one.name,
        len(one.by_item),
        one.short,
        touched,
        whole,
        len(one.grams),
        int(one.seen.sum()),
        one.documents,
    )


def items(file: Path) -> Iterator[str]:
    """Texts of a benchmark: of each line of .jsonl all its text together, else each line.

    Raises DataError.
    """
    try:
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.isspace():
                    continue
                if file.suffix != ".jsonl":
                    yield line
                    continue
                try:
                    yield " ".join(_texts(json.loads(line)))
                except ValueError as error:
                    raise DataError(f"--benchmark {file}:{number}: is not JSON") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--benchmark {file}: cannot be read as text ({error})") from error


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for one in value.values():
            yield from _texts(one)
    elif isinstance(value, list):
        for one in value:
            yield from _texts(one)
