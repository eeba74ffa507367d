"""From a window of a token stream to the arrays of a sample.

A source is one stream of N tokens. Sample j holds inputs [j S, (j+1) S) and, as targets, the
tokens one further on, so every token but the stream's first is predicted exactly once per epoch;
the last sample is padded with weight 0. Nothing is dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmtrain.data.source import TokenSource


def samples_in(num_tokens: int, seq_len: int) -> int:
    """Samples of a stream: ceil((N - 1) / S), 0 when there is nothing to predict."""
    return max(0, -(-(num_tokens - 1) // seq_len))


@dataclass(frozen=True)
class Rows:
    """Arrays [n, seq_len] of n samples; see ``Batch`` for their meaning."""

    tokens: NDArray[np.int64]
    targets: NDArray[np.int64]
    weights: NDArray[np.float32]
    doc_ids: NDArray[np.int32]
    positions: NDArray[np.int64]


@dataclass(frozen=True)
class Pick:
    """Sample ``number`` of ``source``, whose tokens weigh ``weight``."""

    source: TokenSource
    number: int
    weight: float


@dataclass(frozen=True)
class Packing:
    """How windows become samples. mask_boundaries: weight 0 for the first token of a document,
    whose prediction would need another document; reset_positions: restart at documents."""

    seq_len: int
    mask_boundaries: bool
    reset_positions: bool

    def rows(self, picks: Sequence[Pick | None]) -> Rows:
        """The samples ``picks`` in order; None is a row of padding."""
        n, s = len(picks), self.seq_len
        windows = np.zeros((n, s + 1), np.int64)
        starts = np.zeros((n, s + 1), np.bool_)
        lengths = np.zeros(n, np.int64)
        factors = np.zeros(n, np.float32)
        own: list[tuple[int, NDArray[np.float32]]] = []
        for row, pick in enumerate(picks):
            if pick is None:
                continue
            low = pick.number * s
            high = min(low + s + 1, pick.source.num_tokens)
            window = windows[row, : high - low]
            pick.source.read_into(low, high, window)
            starts[row, : high - low] = pick.source.document_starts(low, high, window)
            lengths[row], factors[row] = high - low - 1, pick.weight
            if (each := pick.source.loss_weights(low + 1, high)) is not None:
                own.append((row, each))
        weights = np.repeat(factors[:, None], s, axis=1)
        for row, each in own:
            weights[row, : len(each)] *= each
        if self.mask_boundaries:
            weights[starts[:, 1:]] = 0.0
        begins = starts[:, :-1]
        begins[:, 0] = False
        doc_ids = np.cumsum(begins, axis=1, dtype=np.int32)
        where = np.arange(s)
        positions = np.repeat(where[None], n, axis=0)
        if self.reset_positions:
            positions -= np.maximum.accumulate(np.where(begins, where, 0), axis=1)
        tokens, targets = windows[:, :-1].copy(), windows[:, 1:].copy()
        for row in np.flatnonzero(lengths < s).tolist():
            padding = slice(lengths[row], s)
            tokens[row, padding] = targets[row, padding] = positions[row, padding] = 0
            weights[row, padding] = 0.0
            doc_ids[row, padding] = -1
        return Rows(tokens, targets, weights, doc_ids, positions)
