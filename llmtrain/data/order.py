"""The order of samples within a source: a seeded permutation per epoch in O(1) memory.

A balanced Feistel network over the smallest power of four that holds the source is a bijection
whatever its round function is; numbers that fall outside the source are permuted again until
they fall inside (cycle walking), which keeps it a bijection on the source.
"""

from __future__ import annotations

import numpy as np
import xxhash
from numpy.typing import NDArray

_ROUNDS = 4


def stream_key(seed: int, *parts: str | int) -> int:
    """64-bit key for a named random stream, the same on every machine."""
    text = "\x00".join(str(p) for p in (seed, *parts))
    return xxhash.xxh64_intdigest(text.encode())


def mix(values: NDArray[np.uint64], key: int) -> NDArray[np.uint64]:
    """Keyed 64-bit integer hash, element by element (the finaliser of SplitMix64)."""
    with np.errstate(over="ignore"):
        x = values + np.uint64(key)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def permute(index: NDArray[np.int64], size: int, key: int) -> NDArray[np.int64]:
    """Image of ``index`` (values in [0, size)) under the permutation of [0, size) named ``key``."""
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    shift = np.uint64(half)
    keys = [stream_key(key, r) for r in range(_ROUNDS)]
    out = index.astype(np.uint64)
    todo = np.ones(out.shape, dtype=bool)
    while todo.any():
        x = out[todo]
        left, right = x >> shift, x & mask
        for round_key in keys:
            left, right = right, left ^ (mix(right, round_key) & mask)
        x = (left << shift) | right
        out[todo] = x
        todo[todo] = x >= np.uint64(size)
    return out.astype(np.int64)


def sample_numbers(
    seed: int, source: str, k: NDArray[np.int64], size: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(epoch, number of the sample within the source) of the source's k-th samples of a run."""
    epochs = k // size
    numbers = np.empty_like(k)
    for epoch in np.unique(epochs):
        rows = epochs == epoch
        numbers[rows] = permute(k[rows] % size, size, stream_key(seed, source, int(epoch)))
    return epochs, numbers
