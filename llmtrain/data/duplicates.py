"""Documents that are copies, or nearly copies, of an earlier one.

Exact copies have the same words. Near ones share at least ``threshold`` of their shingles (runs of
five words; Jaccard similarity). Candidates come from MinHash signatures in bands (Broder
1997; Leskovec et al., Mining of Massive Datasets, chapter 3); each is then checked on the shingles
themselves, so nothing is reported that is not so. What the bands overlook: at similarity 0.8 two
pairs in 10,000.

Memory: some 100 bytes per document; the signatures lie in a temporary file.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from llmtrain.data.order import mix, stream_key
from llmtrain.data.words import Hasher, Hashes, Stream, ngrams

SHINGLE = 5
BANDS, ROWS = 16, 4
_CHUNK = 1 << 13  # shingles whose permutations exist at once
_LEADERS = 8  # documents of a bucket that others are compared with
_KEYS = [stream_key(0, "minhash", i) for i in range(BANDS * ROWS)]


@dataclass
class Duplicates:
    """What was found. exact, near: documents by stream that copy an earlier one; tokens: of both.

    documents: by stream. leaked: held-out documents with a copy in another split of the corpus.
    groups: the largest groups, as (documents, text of the first).
    """

    documents: list[int]
    exact: list[int]
    near: list[int]
    tokens: list[int]
    leaked: int = 0
    groups: list[tuple[int, str]] = field(default_factory=list)


class _Forest:
    """Groups of documents; the lowest number of each is its root."""

    def __init__(self, count: int) -> None:
        self._up = np.arange(count)

    def root(self, i: int) -> int:
        up = self._up
        while up[i] != i:
            up[i] = up[up[i]]
            i = int(up[i])
        return i

    def join(self, i: int, j: int) -> None:
        low, high = sorted((self.root(i), self.root(j)))
        self._up[high] = low


class _Finder:
    """Finds groups among the documents of ``streams``."""

    def __init__(self, streams: Sequence[Stream], threshold: float) -> None:
        self.streams, self.threshold, self.hasher = list(streams), threshold, Hasher()
        spans = ((s, *span) for s, stream in enumerate(streams) for span in stream.spans())
        # stream, first token, token behind the last
        self.spans = np.fromiter(chain.from_iterable(spans), np.int64).reshape(-1, 3)
        self.forest = _Forest(len(self.spans))
        self.empty = np.zeros(len(self.spans), bool)

    def words(self, i: int) -> Hashes:
        """Hashed words of document ``i``."""
        stream, start, stop = self.spans[i].tolist()
        return self.hasher.document(self.streams[stream], start, stop)

    def sign(self, signatures: NDArray[np.uint32]) -> NDArray[np.uint64]:
        """Fill ``signatures`` [documents, bands * rows]; returns a hash of each one's words."""
        whole = np.zeros(len(self.spans), np.uint64)
        for i in range(len(self.spans)):
            words = self.words(i)
            self.empty[i] = not len(words)
            whole[i] = xxhash.xxh64_intdigest(words.tobytes())
            signatures[i] = minhash(shingles(words))
        return whole

    def join_equal(self, whole: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Join documents of the same words; returns which are copies of an earlier one."""
        copies = np.zeros(len(whole), bool)
        order = np.argsort(whole, kind="stable")
        for place in np.flatnonzero(whole[order[1:]] == whole[order[:-1]]):
            first, second = int(order[place]), int(order[place + 1])
            if not self.empty[second]:
                self.forest.join(first, second)
                copies[second] = True
        return copies

    def join_near(self, keys: NDArray[np.uint64], left: NDArray[np.int64]) -> None:
        """Join similar ones of the documents ``left`` that share a key of one band."""
        order = np.argsort(keys, kind="stable")
        edges = np.flatnonzero(keys[order[1:]] != keys[order[:-1]]) + 1
        begins = np.concatenate([[0], edges])
        ends = np.concatenate([edges, [len(order)]])
        for bucket in np.flatnonzero(ends - begins > 1):
            members = order[begins[bucket] : ends[bucket]]
            self._join_bucket(left[members].tolist())

    def _join_bucket(self, members: list[int]) -> None:
        leaders: list[tuple[int, Hashes]] = []
        for i in members:
            roots = {self.forest.root(leader) for leader, _ in leaders}
            if self.forest.root(i) in roots:
                continue
            own = shingles(self.words(i))
            for leader, theirs in leaders:
                if jaccard(own, theirs) >= self.threshold:
                    self.forest.join(leader, i)
                    break
            else:
                if len(leaders) < _LEADERS:
                    leaders.append((i, own))


def shingles(words: Hashes) -> Hashes:
    """Distinct shingles of a document; a shorter document is one shingle."""
    return np.unique(ngrams(words, min(SHINGLE, max(len(words), 1))))


def minhash(shingles: Hashes) -> NDArray[np.uint32]:
    """[bands * rows] the least value of the shingles under each of as many hash functions."""
    out = np.full(len(_KEYS), np.iinfo(np.uint32).max, np.uint32)
    for low in range(0, len(shingles), _CHUNK):
        part = shingles[low : low + _CHUNK]
        for k, key in enumerate(_KEYS):
            least = (mix(part, key) >> np.uint64(32)).min()
            out[k] = min(out[k], np.uint32(least))
    return out


def jaccard(a: Hashes, b: Hashes) -> float:
    """Shared part of two sets of distinct hashes."""
    both = len(np.intersect1d(a, b, assume_unique=True))
    return both / max(len(a) + len(b) - both, 1)


def find_duplicates(
    streams: Sequence[Stream], threshold: float, heldout: Sequence[bool], shown: int
) -> Duplicates:
    """Groups of equal and similar documents over all ``streams`` together.

    heldout: which of the streams are held out. shown: so many of the largest groups are given as
    examples.
    """
    finder = _Finder(streams, threshold)
    count = len(finder.spans)
    with tempfile.TemporaryDirectory(prefix="llmtrain-minhash-") as folder:
        shape = (max(count, 1), BANDS * ROWS)
        signatures = np.memmap(Path(folder) / "signatures", np.uint32, "w+", shape=shape)
        copies = finder.join_equal(finder.sign(signatures))
        left = np.flatnonzero(~copies & ~finder.empty)
        for band in range(BANDS):
            rows = np.asarray(signatures[left, band * ROWS : (band + 1) * ROWS], np.uint64)
            keys = np.zeros(len(left), np.uint64)
            for column in rows.T:
                keys = mix(keys ^ column, band)
            finder.join_near(keys, left)
        del signatures
    roots = np.fromiter((finder.forest.root(i) for i in range(count)), np.int64, count)
    return _summary(finder, roots, copies, np.array(heldout, bool), shown)


def _summary(
    finder: _Finder,
    roots: NDArray[np.int64],
    copies: NDArray[np.bool_],
    heldout: NDArray[np.bool_],
    shown: int,
) -> Duplicates:
    owner, sizes = finder.spans[:, 0], finder.spans[:, 2] - finder.spans[:, 1]
    again = roots != np.arange(len(roots))
    streams = range(len(finder.streams))
    found = Duplicates(
        [int((owner == s).sum()) for s in streams],
        [int((copies & (owner == s)).sum()) for s in streams],
        [int((again & ~copies & (owner == s)).sum()) for s in streams],
        [int(sizes[again & (owner == s)].sum()) for s in streams],
    )
    outside = np.unique(roots[~heldout[owner]])
    found.leaked = int((heldout[owner] & np.isin(roots, outside)).sum())
    names, number = np.unique(roots, return_counts=True)
    for place in np.argsort(-number, kind="stable")[:shown]:
        if number[place] > 1:
            stream, start, stop = finder.spans[names[place]].tolist()
            text = finder.streams[stream].text(start, min(stop, start + 40))
            found.groups.append((int(number[place]), text))
    return found
