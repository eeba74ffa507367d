"""The order of samples within a source: a seeded permutation per epoch in O(1) memory.

A Feistel network is a bijection whatever its round function is. Its two halves here are digits
to two bases whose product is just above the size of the source (Black and Rogaway, "Ciphers with
arbitrary finite domains", 2002); the few numbers that fall outside the source are permuted again
until they fall inside (cycle walking), which keeps it a bijection on the source.
"""

from __future__ import annotations

import math

import numpy as np
import xxhash
from numpy.typing import NDArray

_ROUNDS = 6


def stream_key(seed: int, *parts: str | int) -> int:
    """64-bit key for a named random stream, the same on every machine."""
    text = "\x00".join(str(p) for p in (seed, *parts))
    return xxhash.xxh64_intdigest(text.encode())


def mix(values: NDArray[np.uint64], key: int) -> NDArray[np.uint64]:
    """Keyed 64-bit integer hash, element by element (the finaliser of SplitMix64)."""
    x = values + np.uint64(key)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(index: NDArray[np.int64], size: int, key: int) -> NDArray[np.int64]:
    """Image of ``index`` (values in [0, size)) under the permutation of [0, size) named ``key``."""
    low_base = math.isqrt(size - 1) + 1
    high_base = -(-size // low_base)
    bases = np.uint64(low_base), np.uint64(high_base)
    keys = [stream_key(key, r) for r in range(_ROUNDS)]
    out = index.astype(np.uint64)
    todo: NDArray[np.bool_] | slice = slice(None)
    while True:
        high, low = np.divmod(out[todo], bases[0])
        for low_key, high_key in zip(keys[::2], keys[1::2], strict=True):
            low = (low + mix(high, low_key) % bases[0]) % bases[0]
            high = (high + mix(low, high_key) % bases[1]) % bases[1]
        out[todo] = high * bases[0] + low
        todo = out >= np.uint64(size)
        if not todo.any():
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
