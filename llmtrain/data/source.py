"""A source: one flat stream of tokens with random access, whatever the format on disk."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class TokenSource(Protocol):
    """A flat stream of ``num_tokens`` tokens, documents one after the other.

    Implementations keep no index arrays: they find their place by arithmetic or by binary
    search in memory-mapped files. They are safe to read from several threads and after a fork.
    """

    name: str
    num_tokens: int
    fingerprint: str  # of the content, stable under moving the files

    def read(self, start: int, stop: int) -> NDArray[np.int64]:
        """Tokens [start, stop) as int64, 0 <= start <= stop <= num_tokens."""
        ...

    def read_into(self, start: int, stop: int, out: NDArray[np.int64]) -> None:
        """Tokens [start, stop) written to ``out``, which has room for exactly these."""
        ...

    def document_starts(
        self, start: int, stop: int, tokens: NDArray[np.int64]
    ) -> NDArray[np.bool_]:
        """Which of the tokens [start, stop) begin a document; ``tokens`` is what read returned."""
        ...

    def loss_weights(self, start: int, stop: int) -> NDArray[np.float32] | None:
        """Weights in the loss of the tokens [start, stop), as targets; None: all are 1."""
        ...

    def close(self) -> None:
        """Release files."""
        ...
