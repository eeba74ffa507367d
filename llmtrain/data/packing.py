"""From a window of a token stream to the arrays of a sample.

A source is one stream of N tokens. Sample j holds inputs [j S, (j+1) S) and, as targets, the
tokens one further on, so every token but the stream's first is predicted exactly once per epoch;
the last sample is padded with weight 0. Nothing is dropped.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmtrain.data.source import TokenSource


def samples_in(num_tokens: int, seq_len: int) -> int:
    """Samples of a stream: ceil((N - 1) / S), 0 when there is nothing to predict."""
    return max(0, -(-(num_tokens - 1) // seq_len))


@dataclass
class Rows:
    """Arrays [n, seq_len] of n samples; see ``Batch`` for their meaning."""

    tokens: NDArray[np.int64]
    targets: NDArray[np.int64]
    weights: NDArray[np.float32]
    doc_ids: NDArray[np.int32]
    positions: NDArray[np.int64]

    @classmethod
    def empty(cls, n: int, seq_len: int) -> Rows:
        """Room for ``n`` samples, padding everywhere."""
        shape = (n, seq_len)
        return cls(
            np.zeros(shape, np.int64),
            np.zeros(shape, np.int64),
            np.zeros(shape, np.float32),
            np.full(shape, -1, np.int32),
            np.zeros(shape, np.int64),
        )


@dataclass(frozen=True)
class Packing:
    """How windows become samples. mask_boundaries: weight 0 for the first token of a document,
    whose prediction would need another document; reset_positions: restart at documents."""

    seq_len: int
    mask_boundaries: bool
    reset_positions: bool

    def fill(self, rows: Rows, row: int, source: TokenSource, number: int, weight: float) -> None:
        """Write sample ``number`` of ``source`` to ``rows[row]``; its tokens weigh ``weight``."""
        start = number * self.seq_len
        stop = min(start + self.seq_len + 1, source.num_tokens)
        n = stop - start - 1
        tokens = source.read(start, stop)
        starts = source.document_starts(start, stop, tokens)
        rows.tokens[row, :n] = tokens[:-1]
        rows.targets[row, :n] = tokens[1:]
        weights = rows.weights[row, :n]
        weights[:] = weight
        if self.mask_boundaries:
            weights[starts[1:]] = 0.0
        begins = starts[:-1].copy()
        begins[0] = True
        rows.doc_ids[row, :n] = np.cumsum(begins) - 1
        where = np.arange(n)
        rows.positions[row, :n] = where
        if self.reset_positions:
            rows.positions[row, :n] -= np.maximum.accumulate(np.where(begins, where, 0))
