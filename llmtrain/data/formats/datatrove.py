"""datatrove's token files: ``X.ds`` (tokens), ``X.ds.index`` (document ends), ``X.ds.metadata``."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmtrain.config.schema import SourceConfig
from llmtrain.data.formats.files import (
    DEFAULT_DTYPE,
    FileParts,
    TokenFile,
    find_files,
    whole_tokens,
)
from llmtrain.data.formats.flat import FlatSource, TokenRun
from llmtrain.data.formats.hashing import fingerprint
from llmtrain.data.formats.maps import map_file
from llmtrain.errors import DataError

SUFFIX = ".ds"
_BY_SIZE: dict[int, np.dtype[Any]] = {2: np.dtype("<u2"), 4: np.dtype("<u4")}


class DatatroveParts(FileParts):
    """Token files with a mapped array of document ends each; ``indices`` empty: none have one."""

    def __init__(self, files: Sequence[TokenFile], indices: Sequence[NDArray[Any]]) -> None:
        super().__init__(files)
        self.indices = indices

    def starts(self, part: int, run: TokenRun, low: int, high: int) -> NDArray[np.int64]:
        """A document starts where the one before it ends; found by bisection in the index."""
        if not self.indices:
            return super().starts(part, run, low, high)
        ends = self.indices[part]
        first, last = bisect_left(ends, low), bisect_right(ends, high - 1)
        found = ends[first:last].astype(np.int64)
        return np.concatenate([np.zeros(1, np.int64), found]) if low == 0 else found


def open_datatrove(name: str, cfg: SourceConfig, *, eos_id: int | None) -> FlatSource:
    """One ``.ds`` file, or those of a folder or glob in sorted order, as one stream.

    Documents come from the ``.index`` files; without them from ``eos_id``. The token size comes
    from ``cfg.dtype``, the metadata, or the index and the file's size, in this order.
    """
    paths = find_files(cfg.path, (SUFFIX,))
    named = [Path(f"{path}.index") for path in paths]
    present = [path for path in named if path.exists()]
    if present and len(present) < len(named):
        missing = next(path for path in named if not path.exists())
        raise DataError(
            f"{missing} is missing while other files have an index: copy it, or remove all of them"
        )
    indices = [_read_index(path) for path in present]
    files = []
    for number, path in enumerate(paths):
        end = int(indices[number][-1]) if indices and len(indices[number]) else None
        files.append(_token_file(path, cfg.dtype, end))
    return FlatSource(
        name,
        DatatroveParts(files, indices),
        fingerprint=fingerprint("flat", ",".join(sorted({f.dtype.name for f in files})), paths),
        eos_id=None if indices else eos_id,
    )


def _read_index(path: Path) -> NDArray[Any]:
    """The mapped document ends (uint64). Raises DataError when the file is damaged."""
    size = path.stat().st_size
    if size % 8:
        raise DataError(f"{path} is truncated: {size} bytes are no whole uint64: copy it again")
    return map_file(path, np.dtype("<u8"), count=size // 8)


def _token_file(path: Path, dtype: str | None, end: int | None) -> TokenFile:
    """A ``.ds`` file; ``end``: its tokens by the index. DataError when the two do not fit."""
    size = path.stat().st_size
    token_size = _metadata_size(path)
    if dtype is not None:
        found = np.dtype(dtype).newbyteorder("<")
    elif token_size in _BY_SIZE:
        found = _BY_SIZE[token_size]
    elif end and size == 4 * end:
        found = _BY_SIZE[4]
    else:
        found = np.dtype(DEFAULT_DTYPE).newbyteorder("<")
    count = whole_tokens(path, found, size)
    if end is not None and end != count:
        raise DataError(
            f"{path} holds {count} tokens of {found.name} but its index ends at {end}: it is "
            "truncated, or the dtype of its source is wrong"
        )
    return TokenFile(path, found, 0, count, size)


def _metadata_size(path: Path) -> int:
    """Bytes per token by the metadata (first line ``tokenizer|size``); 0 when it says nothing."""
    metadata = Path(f"{path}.metadata")
    if not metadata.exists():
        return 0
    lines = metadata.read_text(encoding="utf-8", errors="replace").splitlines()
    last = lines[0].rpartition("|")[2] if lines else ""
    return int(last) if last.isdigit() else 0
