"""Hashes of files: recorded ones to verify, sampled ones as a cheap identity."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import xxhash

_BLOCK = 1 << 20
_SAMPLE = 1 << 12


def _hasher(algorithm: str) -> Any:
    """A fresh hasher; None when neither xxhash nor hashlib knows the name."""
    if algorithm in xxhash.algorithms_available:
        return getattr(xxhash, algorithm)()
    if algorithm in hashlib.algorithms_guaranteed and not algorithm.startswith("shake"):
        return hashlib.new(algorithm, usedforsecurity=False)
    return None


def mismatch(path: Path, recorded: Mapping[str, str]) -> str | None:
    """Compares a file with the fastest of its recorded hashes.

    Returns None when they agree or no recorded hash is known here, otherwise what differs.
    """
    for algorithm in sorted(recorded, key=lambda a: (not a.startswith("xxh"), a)):
        hasher = _hasher(algorithm)
        if hasher is None:
            continue
        with path.open("rb") as stream:
            while block := stream.read(_BLOCK):
                hasher.update(block)
        found = hasher.hexdigest()
        if found != recorded[algorithm]:
            return f"its {algorithm} is {found}, recorded is {recorded[algorithm]}"
        return None
    return None


def digest(value: object) -> str:
    """32 hex digits that identify a JSON value."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return xxhash.xxh3_128_hexdigest(text.encode())


def sample(path: Path) -> list[object]:
    """Cheap identity of a file: its size and a hash of its head, middle and tail (4 KiB each)."""
    size = path.stat().st_size
    hasher = xxhash.xxh3_64()
    with path.open("rb") as stream:
        for place in (0, size // 2, max(0, size - _SAMPLE)):
            stream.seek(place)
            hasher.update(stream.read(_SAMPLE))
    return [size, hasher.hexdigest()]


def fingerprint(kind: str, dtype: str, paths: Iterable[Path]) -> str:
    """Fingerprint of files read one after the other; names and places do not enter."""
    return digest([kind, dtype, [sample(path) for path in paths]])
