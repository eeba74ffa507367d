"""Flat token files: ``.npy`` with its header, or raw little-endian tokens (OLMo, nanoGPT)."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from llmtrain.config.schema import SourceConfig
from llmtrain.data.formats.files import (
    DEFAULT_DTYPE,
    FileParts,
    TokenFile,
    find_files,
    whole_tokens,
)
from llmtrain.data.formats.flat import FlatSource
from llmtrain.data.formats.hashing import fingerprint
from llmtrain.errors import DataError

SUFFIXES = (".npy", ".bin")
_MAGIC = b"\x93NUMPY"


def open_npy(name: str, cfg: SourceConfig, *, eos_id: int | None) -> FlatSource:
    """One or more token files, in sorted order, as one stream.

    Files that begin with numpy's header have their own dtype; others are raw tokens of
    ``cfg.dtype`` (uint16 when it is null). Each file begins a document.
    """
    paths = find_files(cfg.path, SUFFIXES)
    files = [token_file(path, cfg.dtype) for path in paths]
    dtypes = ",".join(sorted({file.dtype.name for file in files}))
    return FlatSource(
        name, FileParts(files), fingerprint=fingerprint("flat", dtypes, paths), eos_id=eos_id
    )


def token_file(path: Path, dtype: str | None) -> TokenFile:
    """Reads the head of a file. Raises DataError when its tokens cannot be read in place."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        if stream.read(len(_MAGIC)) != _MAGIC:
            raw = np.dtype(dtype or DEFAULT_DTYPE).newbyteorder("<")
            return TokenFile(path, raw, 0, whole_tokens(path, raw, size), size)
        stream.seek(0)
        try:
            version = np.lib.format.read_magic(stream)
            read = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }[version]
            shape, fortran, found = read(stream)
        except (ValueError, KeyError) as error:
            raise DataError(f"{path} has a damaged .npy header ({error}): copy it again") from error
        offset = stream.tell()
    if found.kind not in "iu" or (fortran and len(shape) > 1):
        raise DataError(
            f"{path} holds {found}{' in Fortran order' if fortran else ''}: tokens must be "
            "integers in C order, convert the file"
        )
    if dtype is not None and np.dtype(dtype) != found:
        raise DataError(
            f"{path} holds {found} by its header but the source's dtype says {dtype}: remove "
            "dtype from the source"
        )
    count = int(np.prod(shape, dtype=np.int64))
    if size != offset + count * found.itemsize:
        raise DataError(
            f"{path} is truncated: {size} bytes where its header says "
            f"{offset + count * found.itemsize}: copy it again"
        )
    return TokenFile(path, found, offset, count, size)
