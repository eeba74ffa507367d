"""Token sources in memory, for tests of what is built on them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

EOS = 0


class MemorySource:
    """A TokenSource over an array in which 0 ends a document."""

    def __init__(self, name: str, tokens: NDArray[np.int64], fingerprint: str = "") -> None:
        self.name, self.tokens = name, np.asarray(tokens, np.int64)
        self.num_tokens = len(self.tokens)
        self.fingerprint = fingerprint or f"{name}-{self.tokens.tobytes().hex()[:64]}"

    def read(self, start: int, stop: int) -> NDArray[np.int64]:
        return self.tokens[start:stop]

    def read_into(self, start: int, stop: int, out: NDArray[np.int64]) -> None:
        out[:] = self.tokens[start:stop]

    def document_starts(
        self, start: int, stop: int, tokens: NDArray[np.int64]
    ) -> NDArray[np.bool_]:
        if start == 0:
            return np.append(True, self.tokens[: max(stop - 1, 0)] == EOS)[:stop]
        return self.tokens[start - 1 : stop - 1] == EOS

    def loss_weights(self, start: int, stop: int) -> NDArray[np.float32] | None:
        return None

    def close(self) -> None:
        pass


def documents(seed: int, n: int, longest: int = 40) -> NDArray[np.int64]:
    """A stream of n documents of random lengths and contents, each ended by 0."""
    rng = np.random.default_rng(seed)
    parts = [
        np.append(rng.integers(1, 99, rng.integers(1, longest)), EOS).astype(np.int64)
        for _ in range(n)
    ]
    return np.concatenate(parts)
