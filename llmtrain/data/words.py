"""Documents of token streams as hashed words, and their n-grams."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import xxhash
from numpy.typing import NDArray

from llmtrain.data.formats import FlatSource
from llmtrain.data.order import mix
from llmtrain.data.tokenizer import Tokenizer

Hashes = NDArray[np.uint64]

WINDOW = 1 << 19  # tokens read at once
LONGEST = 1 << 20  # tokens of a document that are compared; a longer one is cut into pieces
_WORD = re.compile(r"\w+")
_CACHED = 1 << 18
_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd: multiplying by it loses nothing modulo 2^64


@dataclass(frozen=True)
class Stream:
    """A named token stream whose documents are compared. tokenizer: None: tokens are the words."""

    name: str
    source: FlatSource
    tokenizer: Tokenizer | None

    def spans(self) -> Iterator[tuple[int, int]]:
        """(first token, token behind the last) of every document, in order.

        Without the padding between conversations, of which nothing is trained on.
        """
        for start, stop in self._spans():
            weights = self.source.loss_weights(start, stop)
            if weights is None or weights.any():
                yield start, stop

    def _spans(self) -> Iterator[tuple[int, int]]:
        begin = 0
        for low in range(0, self.source.num_tokens, WINDOW):
            high = min(low + WINDOW, self.source.num_tokens)
            starts = self.source.document_starts(low, high, self.source.read(low, high))
            for start in (np.flatnonzero(starts) + low).tolist():
                yield from _pieces(begin, start)
                begin = start
        yield from _pieces(begin, self.source.num_tokens)

    def text(self, start: int, stop: int) -> str:
        """Tokens [start, stop) as text, or as numbers without a tokenizer."""
        tokens = self.source.read(start, stop)
        return self.tokenizer.decode(tokens) if self.tokenizer else " ".join(map(str, tokens))


class Hasher:
    """64-bit hashes of words, with a cache of the words met last."""

    def __init__(self) -> None:
        self._known: dict[str, int] = {}

    def document(self, stream: Stream, start: int, stop: int) -> Hashes:
        """[words] hashes of a document's words in lower case; of its tokens, without tokenizer."""
        if stream.tokenizer is None:
            return mix(stream.source.read(start, stop).astype(np.uint64), 1)
        return self.text(stream.text(start, stop))

    def text(self, text: str) -> Hashes:
        """[words] hashes of the words (runs of letters and digits) of ``text`` in lower case."""
        known, out = self._known, []
        for word in _WORD.findall(text.lower()):
            value = known.get(word)
            if value is None:
                if len(known) >= _CACHED:
                    known.clear()
                value = known[word] = xxhash.xxh64_intdigest(word.encode())
            out.append(value)
        return np.array(out, np.uint64)


def ngrams(words: Hashes, n: int) -> Hashes:
    """[words - n + 1] hash of every run of ``n`` words; empty for a shorter text."""
    count = len(words) - n + 1
    if count <= 0:
        return np.zeros(0, np.uint64)
    out = np.zeros(count, np.uint64)
    for i in range(n):
        out = out * _BASE + words[i : i + count]
    return mix(out, n)


def _pieces(start: int, stop: int) -> Iterator[tuple[int, int]]:
    for low in range(start, stop, LONGEST):
        yield low, min(low + LONGEST, stop)
