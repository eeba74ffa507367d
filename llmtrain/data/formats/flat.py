"""One flat stream of tokens over many mapped parts: what all the formats become."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from llmtrain.data.formats.maps import POOL, MapPool
from llmtrain.errors import DataError


class TokenRun(Protocol):
    """The tokens of one part: a flat array, or an object that slices like one."""

    def __len__(self) -> int: ...

    def __getitem__(self, window: slice, /) -> NDArray[Any]: ...


class Parts(Protocol):
    """The parts of a stream (shards, files), as a format knows them."""

    counts: Sequence[int]  # tokens of each part
    indexed: bool  # whether the format itself knows where documents start

    def open(self, part: int) -> TokenRun:
        """Maps a part. Raises DataError naming the file when it is missing or damaged."""
        ...

    def gone(self, part: int) -> bool:
        """Whether an open part has left its cache, so that its map only holds disk space."""
        ...

    def starts(self, part: int, run: TokenRun, low: int, high: int) -> NDArray[np.int64]:
        """Document starts among tokens [low, high) of a part; only asked when ``indexed``."""
        ...

    def verify(self) -> int:
        """Compares the parts with their recorded hashes; how many had one. Raises DataError."""
        ...


@contextmanager
def naming(source: str) -> Iterator[None]:
    """Puts the name of the source before the message of a DataError that lacks it."""
    try:
        yield
    except DataError as error:
        prefix = f"source '{source}'"
        if str(error).startswith(prefix):
            raise
        raise DataError(f"{prefix}: {error}") from error


class FlatSource:
    """A ``TokenSource`` over ``Parts``. Parts are opened when first read.

    Finding a token is a bisection among the parts and a slice; there is no index array and no
    lock on that path. Safe from several threads and after a fork.

    ``eos_id``: a token after it starts a document. Starts of the format's own index count too.
    ``text_bytes``: UTF-8 bytes of the text behind the tokens, where the folder records them.
    """

    window: int | None = None

    def __init__(
        self,
        name: str,
        parts: Parts,
        *,
        fingerprint: str,
        eos_id: int | None,
        num_tokens: int | None = None,
        text_bytes: int | None = None,
        pool: MapPool = POOL,
    ) -> None:
        self.name = name
        self.fingerprint = fingerprint
        self.eos_id = eos_id
        self.text_bytes = text_bytes
        self._parts = parts
        self._pool = pool
        self._ends = list(accumulate(parts.counts))
        self._begins = [0, *self._ends]
        total = self._ends[-1] if self._ends else 0
        self.num_tokens = total if num_tokens is None else num_tokens
        self._runs: list[TokenRun | None] = [None] * len(self._ends)
        self._mapped: set[int] = set()
        if self.num_tokens == 0:
            raise DataError(f"source '{name}' holds no tokens: prepare it again or remove it")

    def read(self, start: int, stop: int) -> NDArray[np.int64]:
        """Tokens [start, stop) as a new int64 array. Raises IndexError outside the stream."""
        part = bisect_right(self._ends, start)
        if 0 <= start < stop <= self.num_tokens and stop <= self._ends[part]:
            run = self._runs[part]
            if run is None:
                run = self._open(part)
            begin = self._begins[part]
            return run[start - begin : stop - begin].astype(np.int64)
        out = np.empty(max(0, stop - start), np.int64)
        self.read_into(start, stop, out)
        return out

    def read_into(self, start: int, stop: int, out: NDArray[np.int64]) -> None:
        """Tokens [start, stop) written to ``out``, an int64 array of stop - start items.

        Saves the copy when a batch is put together. Raises IndexError outside the stream.
        """
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(
                f"tokens [{start}, {stop}) of source '{self.name}' with {self.num_tokens} tokens"
            )
        part = bisect_right(self._ends, start)
        done = 0
        while start < stop:
            begin, end = self._begins[part], self._ends[part]
            run = self._runs[part]
            if run is None:
                run = self._open(part)
            if stop <= end:
                out[done:] = run[start - begin : stop - begin]
                return
            count = end - start
            out[done : done + count] = run[start - begin : end - begin]
            start, done, part = end, done + count, part + 1

    def document_starts(
        self, start: int, stop: int, tokens: NDArray[np.int64]
    ) -> NDArray[np.bool_]:
        """Which of the tokens [start, stop) begin a document; ``tokens`` is what read returned."""
        marks = np.zeros(stop - start, np.bool_)
        if start == stop:
            return marks
        part = bisect_right(self._ends, start)
        if self.eos_id is not None:
            np.equal(tokens[:-1], self.eos_id, out=marks[1:])
            begin = self._begins[part]
            if start > begin:
                marks[0] = self._run(part)[start - begin - 1 : start - begin][0] == self.eos_id
            elif start > 0:
                marks[0] = self.read(start - 1, start)[0] == self.eos_id
        if start == 0:
            marks[0] = True
        if self._parts.indexed:
            self._mark(marks, start, stop, part)
        return marks

    def loss_weights(self, start: int, stop: int) -> NDArray[np.float32] | None:
        """Weights in the loss of the tokens [start, stop), as targets; None: all are 1."""
        return None

    def _mark(self, marks: NDArray[np.bool_], start: int, stop: int, part: int) -> None:
        """Marks the starts among tokens [start, stop) that the format knows of."""
        while part < len(self._ends) and self._begins[part] < stop:
            begin = self._begins[part]
            low, high = max(0, start - begin), min(stop, self._ends[part]) - begin
            if low < high:  # not an empty part
                marks[self._parts.starts(part, self._run(part), low, high) + (begin - start)] = True
            part += 1

    def verify(self) -> int:
        """Reads everything and compares it with the recorded hashes.

        Returns how many shards had a hash to compare with. Raises DataError naming the first
        file that differs.
        """
        with naming(self.name):
            return self._parts.verify()

    def close(self) -> None:
        """Releases the maps. A later read opens them again."""
        for part in list(self._mapped):
            self._pool.remove(self, part)
            self.drop(part)

    def drop(self, part: int) -> None:
        """Forgets the map of a part; readers that hold it keep it alive until they are done."""
        self._runs[part] = None
        self._mapped.discard(part)

    def _run(self, part: int) -> TokenRun:
        run = self._runs[part]
        return self._open(part) if run is None else run

    def _open(self, part: int) -> TokenRun:
        """Opens a part and drops the maps of those that have left the cache meanwhile."""
        for other in list(self._mapped):
            if self._parts.gone(other):
                self._pool.remove(self, other)
                self.drop(other)
        with naming(self.name):
            run = self._parts.open(part)
        if len(run) != self._parts.counts[part]:
            raise DataError(
                f"source '{self.name}': part {part} holds {len(run)} tokens where its index "
                f"says {self._parts.counts[part]}: copy or prepare the folder again"
            )
        self._runs[part] = run
        self._mapped.add(part)
        self._pool.add(self, part)
        return run
