"""Formats whose files are plain arrays of tokens: finding the files, mapping them."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmtrain.data.formats.flat import TokenRun
from llmtrain.data.formats.maps import map_file
from llmtrain.errors import DataError

DEFAULT_DTYPE = "uint16"
_PROBE = 512
_MAX_ID = 1 << 31


@dataclass(frozen=True)
class TokenFile:
    """A file with ``count`` tokens of ``dtype`` from byte ``offset`` on; ``size``: its bytes."""

    path: Path
    dtype: np.dtype[Any]
    offset: int
    count: int
    size: int


class FileParts:
    """Token files one after the other. Each file begins a document."""

    def __init__(self, files: Sequence[TokenFile]) -> None:
        self.files = files
        self.indexed = True
        self.counts: Sequence[int] = [file.count for file in files]
        for file in files:
            _probe(file)

    def open(self, part: int) -> TokenRun:
        file = self.files[part]
        try:
            size = file.path.stat().st_size
            if size != file.size:
                raise DataError(
                    f"{file.path} changed while it was in use: {size} bytes, {file.size} before"
                )
            return map_file(file.path, file.dtype, offset=file.offset, count=file.count)
        except FileNotFoundError as error:
            raise DataError(f"{file.path} is missing: put it back or change the path") from error

    def gone(self, part: int) -> bool:
        return False

    def starts(self, part: int, run: TokenRun, low: int, high: int) -> NDArray[np.int64]:
        return np.zeros(1 if low == 0 else 0, np.int64)

    def verify(self) -> int:
        return 0


def find_files(path: str, suffixes: tuple[str, ...]) -> list[Path]:
    """The files that ``path`` means: a file, a glob, or a folder's files with a suffix; sorted.

    Of what a glob matches, files with one of the suffixes are taken, or all if none has one.

    Raises DataError when there are none.
    """
    place = Path(path)
    if place.is_file():
        return [place]
    if place.is_dir():
        found = [p for p in place.rglob("*") if p.suffix in suffixes and p.is_file()]
        what = f"the folder {path} has no files ending in {' or '.join(suffixes)}"
    else:
        matches = [p for p in map(Path, glob.glob(path, recursive=True)) if p.is_file()]
        found = [p for p in matches if p.suffix in suffixes] or matches
        what = f"no file matches {path}"
    if not found:
        raise DataError(f"{what}: check the path of the source")
    return sorted(found)


def whole_tokens(path: Path, dtype: np.dtype[Any], size: int) -> int:
    """Tokens in ``size`` bytes of ``path``; DataError when they are no whole number."""
    count, rest = divmod(size, dtype.itemsize)
    if rest:
        raise DataError(
            f"{path} holds {size} bytes of tokens, no whole number of {dtype.name}: it is "
            "truncated, or the dtype of its source is wrong"
        )
    return count


def _probe(file: TokenFile) -> None:
    """Looks at some tokens, since a wrong dtype mostly shows as impossible ids."""
    if file.dtype.itemsize < 4 or file.count == 0:
        return
    run = map_file(file.path, file.dtype, offset=file.offset, count=file.count)
    for begin in (0, file.count // 2, max(0, file.count - _PROBE)):
        window = run[begin : begin + _PROBE]
        if int(window.min()) < 0 or int(window.max()) >= _MAX_ID:
            raise DataError(
                f"{file.path} read as {file.dtype.name} holds ids from {int(window.min())} to "
                f"{int(window.max())}: the dtype of its source is wrong"
            )
