"""Writing converted models: one tensor in memory at a time, and a folder that appears whole."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from llmtrain.checkpoint.safefile import FileSum, HashingFile, build_header
from llmtrain.checkpoint.tensors import dtype_name, tensor_bytes

SHARD_BYTES = 5 << 30
_BLOCK = 1 << 22


@dataclass(frozen=True)
class Converted:
    """What came out: folder, architecture, parameters, bytes of weights, things to know."""

    path: Path
    architecture: str
    n_params: int
    bytes: int
    notes: list[str]


@dataclass(frozen=True)
class Target:
    """A tensor to be written: its name, dtype and shape."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Size on disk."""
        return prod(self.shape) * self.dtype.itemsize


def shards_of(units: Sequence[Sequence[Target]], limit: int) -> list[list[Sequence[Target]]]:
    """Units (tensors that are made together) in files of at most ``limit`` bytes; a larger unit
    gets one of its own."""
    shards: list[list[Sequence[Target]]] = [[]]
    filled = 0
    for unit in units:
        size = sum(target.bytes for target in unit)
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(unit)
        filled += size
    return shards


def write_file(
    path: Path, targets: Sequence[Target], values: Iterable[Iterable[Tensor]]
) -> FileSum:
    """Write ``targets``; ``values`` gives those of each in blocks, in this order."""
    header = [(t.name, dtype_name(t.dtype, t.name), t.shape) for t in targets]
    file = HashingFile(path)
    try:
        file.write(build_header(header, {"format": "pt"})[0])
        for target, blocks in zip(targets, values, strict=True):
            written = 0
            for block in blocks:
                data = tensor_bytes(block.to(target.dtype))
                file.write(data)
                written += len(data)
            assert written == target.bytes, target.name
        return file.finish()
    finally:
        file.close()


def in_blocks(tensor: Tensor, rows: int = 0) -> Iterator[Tensor]:
    """The values in blocks of a few MB, so that a cast copies little; then rows of zeros up to
    ``rows`` of them."""
    flat = tensor.reshape(-1)
    for start in range(0, len(flat), _BLOCK):
        yield flat[start : start + _BLOCK]
    if rows > len(tensor):
        missing = (rows - len(tensor)) * (len(flat) // max(len(tensor), 1))
        yield torch.zeros(missing, dtype=tensor.dtype)
