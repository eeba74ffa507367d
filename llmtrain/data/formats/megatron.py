"""Megatron-LM's indexed datasets: tokens in ``X.bin``, sequences and documents in ``X.idx``.

The index is ``MMIDIDX\\0\\0``, version (uint64, 1), dtype code (uint8), numbers of sequences and
of document indices (uint64), then the sequences' lengths (int32), their byte places in the .bin
(int64) and the sequence each document begins with (int64; one more than there are documents).
"""

from __future__ import annotations

import struct
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmtrain.config.schema import SourceConfig
from llmtrain.data.formats.files import FileParts, TokenFile, find_files
from llmtrain.data.formats.flat import FlatSource, TokenRun
from llmtrain.data.formats.hashing import fingerprint
from llmtrain.data.formats.maps import map_file
from llmtrain.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
_HEAD = struct.Struct("<9sQBQQ")
_DTYPES = {1: "u1", 2: "i1", 3: "i2", 4: "i4", 5: "i8", 8: "u2"}
_PROBES = 64


@dataclass(frozen=True)
class MegatronIndex:
    """A mapped .idx. The arrays lie unaligned in the file, so they are only read item by item."""

    path: Path
    dtype: np.dtype[Any]
    lengths: NDArray[Any]
    pointers: NDArray[Any]
    documents: NDArray[Any]

    def document_start(self, document: int) -> int:
        """Token where a document begins."""
        sequence = int(self.documents[document])
        if sequence >= len(self.pointers):
            return self.tokens
        return int(self.pointers[sequence]) // self.dtype.itemsize

    @property
    def tokens(self) -> int:
        """Tokens up to the end of the last sequence."""
        if not len(self.pointers):
            return 0
        return int(self.pointers[-1]) // self.dtype.itemsize + int(self.lengths[-1])


class MegatronParts(FileParts):
    """``.bin`` files with their indices."""

    def __init__(self, files: Sequence[TokenFile], indices: Sequence[MegatronIndex]) -> None:
        super().__init__(files)
        self.indices = indices

    def starts(self, part: int, run: TokenRun, low: int, high: int) -> NDArray[np.int64]:
        """Bisection among the documents, then those up to ``high``."""
        index = self.indices[part]
        number = bisect_left(range(len(index.documents)), low, key=index.document_start)
        found = []
        while number < len(index.documents):
            start = index.document_start(number)
            if start >= high:
                break
            found.append(start)
            number += 1
        return np.array(found, np.int64)


def open_megatron(name: str, cfg: SourceConfig, *, eos_id: int | None) -> FlatSource:
    """A dataset by its prefix, ``.bin`` or ``.idx``; or those of a folder or glob, in order.

    Documents come from the index, whatever ``eos_id`` is.
    """
    del eos_id
    paths = _index_paths(cfg.path)
    indices = [read_index(path) for path in paths]
    for index in indices:
        if cfg.dtype is not None and np.dtype(cfg.dtype) != index.dtype:
            raise DataError(
                f"{index.path} says {index.dtype.name} but the source's dtype says {cfg.dtype}: "
                "remove dtype from the source"
            )
    files = [_token_file(index) for index in indices]
    kinds = ",".join(sorted({file.dtype.name for file in files}))
    everything = [path for file, idx in zip(files, paths, strict=True) for path in (file.path, idx)]
    return FlatSource(
        name,
        MegatronParts(files, indices),
        fingerprint=fingerprint("megatron", kinds, everything),
        eos_id=None,
    )


def read_index(path: Path) -> MegatronIndex:
    """Maps an .idx and checks its head, its size and some of its entries."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        head = stream.read(_HEAD.size)
    if len(head) < _HEAD.size or not head.startswith(MAGIC):
        raise DataError(f"{path} is no Megatron index (its magic is missing): check the path")
    _, version, code, sequences, documents = _HEAD.unpack(head)
    if version != 1 or code not in _DTYPES:
        raise DataError(f"{path} has version {version} and dtype code {code}, which hold no tokens")
    expected = _HEAD.size + 12 * sequences + 8 * documents
    if size not in (expected, expected + sequences):  # the latter with a mode per sequence
        raise DataError(f"{path} is truncated: {size} bytes where its head says {expected}")
    place = _HEAD.size
    lengths = map_file(path, np.dtype("<i4"), offset=place, count=sequences)
    pointers = map_file(path, np.dtype("<i8"), offset=place + 4 * sequences, count=sequences)
    starts = map_file(path, np.dtype("<i8"), offset=place + 12 * sequences, count=documents)
    index = MegatronIndex(path, np.dtype(_DTYPES[code]), lengths, pointers, starts)
    _check(index)
    return index


def _check(index: MegatronIndex) -> None:
    """Sequences must follow one another in the .bin: looked at in some places."""
    last = len(index.pointers) - 1
    for i in np.unique(np.linspace(0, max(last - 1, 0), _PROBES).astype(np.int64)):
        if last < 1:
            break
        follows = int(index.pointers[i]) + int(index.lengths[i]) * index.dtype.itemsize
        if int(index.pointers[i + 1]) != follows:
            raise DataError(
                f"{index.path} is damaged or not in order at sequence {int(i)}: copy it again or "
                "merge the dataset anew"
            )


def _token_file(index: MegatronIndex) -> TokenFile:
    """The .bin of an index. Raises DataError when it is missing or has another size."""
    path = index.path.with_suffix(".bin")
    try:
        size = path.stat().st_size
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing beside {index.path.name}: copy it too") from error
    expected = index.tokens * index.dtype.itemsize
    if size != expected:
        state = "truncated" if size < expected else "too long"
        raise DataError(
            f"{path} is {state}: {size} bytes where {index.path.name} says {expected}: copy both "
            "files again"
        )
    return TokenFile(path, index.dtype, 0, index.tokens, size)


def _index_paths(path: str) -> list[Path]:
    """The .idx files that a path means."""
    prefixed = Path(f"{path}.idx")
    if prefixed.is_file():
        return [prefixed]
    found = find_files(path, (".idx",) if Path(path).is_dir() else (".idx", ".bin"))
    indices = sorted({file.with_suffix(".idx") for file in found})
    for index in indices:
        if not index.exists():
            raise DataError(f"{index} is missing beside {index.stem}.bin: copy it too")
    return indices
