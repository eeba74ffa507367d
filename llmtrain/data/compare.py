"""The lines of ``llmtrain data inspect --duplicates`` and ``--benchmark``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from llmtrain.data.duplicates import find_duplicates
from llmtrain.data.overlap import check_benchmarks, find_overlap
from llmtrain.data.plan_text import aligned
from llmtrain.data.words import Stream
from llmtrain.errors import DataError

_SHOWN = 3


@dataclass(frozen=True)
class Comparison:
    """similarity: of near copies, None: they are not looked for. benchmarks: files whose runs of
    ``ngram`` words are looked for."""

    similarity: float | None
    benchmarks: Sequence[Path]
    ngram: int


def compare(what: Comparison, streams: Sequence[Stream], heldout: Sequence[bool]) -> Iterator[str]:
    """Lines of the report. Raises DataError."""
    if what.benchmarks and streams[0].tokenizer is None:
        raise DataError("--benchmark compares words, so the tokens need a --tokenizer")
    check_benchmarks(what.benchmarks, what.ngram)
    if what.similarity is not None:
        yield ""
        yield from _duplicates(what.similarity, streams, heldout)
    if what.benchmarks:
        yield ""
        for one in find_overlap(streams, what.benchmarks, what.ngram):
            short = f", {one.short:,} shorter" if one.short else ""
            yield (
                f"{one.name}: {one.touched:,} of {one.items:,} items share {what.ngram} words in a "
                f"row with the text, {one.whole:,} wholly{short}; {one.found:,} of {one.grams:,} "
                f"{what.ngram}-grams"
            )
            for stream, count in zip(streams, one.documents, strict=True):
                if count:
                    yield f"  {stream.name}: in {count:,} documents"


def _duplicates(
    similarity: float, streams: Sequence[Stream], heldout: Sequence[bool]
) -> Iterator[str]:
    found = find_duplicates(streams, similarity, heldout, _SHOWN)
    yield f"copies of earlier documents, near ones from a similarity of {similarity:g} on:"
    rows = [("source", "documents", "copies", "near copies", "tokens of both")]
    columns = zip(streams, found.documents, found.exact, found.near, found.tokens, strict=True)
    rows += [(s.name, f"{d:,}", f"{e:,}", f"{n:,}", f"{t:,}") for s, d, e, n, t in columns]
    yield from (f"  {line}" for line in aligned(rows))
    if any(heldout):
        yield f"  held-out documents with a copy or near copy in training text: {found.leaked:,}"
    for number, text in found.groups:
        yield f"  {number:,} documents like {text!r}"
