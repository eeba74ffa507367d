"""The index.json of an MDS folder, and the stream.json that our own writer puts beside it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmtrain.errors import DataError

COLUMNS = ("tokens", "input_ids")
BYTES_DTYPE = "int64"  # what LLM Foundry's older converters wrote as plain bytes
_REPAIR = "copy the folder again or prepare it again"


@dataclass(frozen=True)
class FileEntry:
    """One file of a shard as the index records it; ``bytes`` is its size."""

    basename: str
    bytes: int
    hashes: Mapping[str, str]


@dataclass(frozen=True)
class ShardEntry:
    """One shard: its file, its compressed form if any, and the layout of a sample.

    ``sizes``: bytes of each column, None for a column whose size varies with the sample.
    """

    raw: FileEntry
    packed: FileEntry | None
    compression: str | None
    samples: int
    columns: tuple[str, ...]
    encodings: tuple[str, ...]
    sizes: tuple[int | None, ...]


@dataclass(frozen=True)
class TokenColumn:
    """Where the tokens are in a sample.

    ``kind`` is ``ndarray`` or ``bytes``; ``length`` the tokens of every sample when the encoding
    fixes it (``ndarray:uint16:1024``), else None.
    """

    position: int
    kind: str
    dtype: np.dtype[Any]
    length: int | None


@dataclass(frozen=True)
class MdsIndex:
    """What index.json says: the shards in order and the column with the tokens."""

    shards: tuple[ShardEntry, ...]
    column: TokenColumn | None  # None only without shards


@dataclass(frozen=True)
class StreamInfo:
    """What stream.json says about a prepared split. ``num_tokens`` excludes the last padding.

    ``weights``: of a stream with marks, its loss weights by number, and ``window``: in which its
    conversations lie whole.
    """

    num_tokens: int
    eos_id: int | None
    dtype: str | None
    text_bytes: int | None
    fingerprint: str | None
    weights: tuple[float, ...] | None = None
    window: int | None = None


def parse_index(text: bytes, where: str, dtype: str | None) -> MdsIndex:
    """Reads the text of an index.json found at ``where``.

    ``dtype``: the tokens' dtype when the column is plain bytes (default int64).
    Raises DataError saying which part of the file is wrong.
    """
    document = _json_object(text, where)
    if document.get("version") != 2 or not isinstance(document.get("shards"), list):
        raise DataError(f"{where} is not an MDS index of version 2: {_REPAIR}")
    shards = []
    for number, entry in enumerate(document["shards"]):
        try:
            shards.append(_shard(entry))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{where}: shard {number} is described wrongly ({error!r}): {_REPAIR}"
            ) from error
    if not shards:
        return MdsIndex((), None)
    columns = {(shard.columns, shard.encodings) for shard in shards}
    if len(columns) > 1:
        raise DataError(
            f"{where}: the shards have different columns: give the parts as separate sources"
        )
    return MdsIndex(tuple(shards), _column(shards[0], where, dtype))


def parse_stream(text: bytes, where: str) -> StreamInfo:
    """Reads the text of a stream.json. Raises DataError when it is damaged."""
    document = _json_object(text, where)
    count, eos = document.get("num_tokens"), document.get("eos_id")
    if not isinstance(count, int) or not isinstance(eos, int | None):
        raise DataError(f"{where}: num_tokens or eos_id is missing or no number: {_REPAIR}")
    weights, window = document.get("weights"), document.get("window")
    numbers = isinstance(weights, list) and all(isinstance(w, int | float) for w in weights)
    if not (weights is None or numbers) or not isinstance(window, int | None):
        raise DataError(f"{where}: weights or window is damaged: {_REPAIR}")
    return StreamInfo(
        num_tokens=count,
        eos_id=eos,
        dtype=document.get("dtype"),
        text_bytes=document.get("bytes"),
        fingerprint=document.get("fingerprint"),
        weights=None if weights is None else tuple(map(float, weights)),
        window=window,
    )


def _json_object(text: bytes, where: str) -> dict[str, Any]:
    """A JSON object, or DataError naming the file."""
    try:
        document = json.loads(text)
    except ValueError as error:
        raise DataError(f"{where} is damaged, it is not JSON ({error}): {_REPAIR}") from error
    if not isinstance(document, dict):
        raise DataError(f"{where} is damaged, it is not a JSON object: {_REPAIR}")
    return document


def _shard(entry: Mapping[str, Any]) -> ShardEntry:
    """One entry of ``shards``. Raises KeyError, TypeError or ValueError when it is malformed."""
    if entry["format"] != "mds" or entry["version"] != 2:
        raise ValueError(f"format {entry['format']!r} version {entry['version']!r}, not MDS 2")
    sizes = tuple(entry["column_sizes"])
    names, encodings = tuple(entry["column_names"]), tuple(entry["column_encodings"])
    if not len(sizes) == len(names) == len(encodings):
        raise ValueError("column names, encodings and sizes differ in number")
    packed = entry.get("zip_data")
    return ShardEntry(
        raw=_file(entry["raw_data"]),
        packed=_file(packed) if packed else None,
        compression=entry.get("compression"),
        samples=int(entry["samples"]),
        columns=names,
        encodings=encodings,
        sizes=tuple(None if size is None else int(size) for size in sizes),
    )


def _file(entry: Mapping[str, Any]) -> FileEntry:
    """A file entry whose name stays inside the folder."""
    name = str(entry["basename"])
    if name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/"):
        raise ValueError(f"file name {name!r} leads out of the folder")
    return FileEntry(name, int(entry["bytes"]), dict(entry.get("hashes") or {}))


def _column(shard: ShardEntry, where: str, dtype: str | None) -> TokenColumn:
    """The token column of a shard and how it is encoded."""
    name = next((column for column in COLUMNS if column in shard.columns), None)
    if name is None:
        raise DataError(
            f"{where} has the columns {', '.join(shard.columns)} but none called "
            f"{' or '.join(COLUMNS)}: this is no tokenized folder, run `llmtrain data prepare`"
        )
    position = shard.columns.index(name)
    encoding = shard.encodings[position]
    kind, _, rest = encoding.partition(":")
    if encoding == "bytes":
        return TokenColumn(
            position, "bytes", np.dtype(dtype or BYTES_DTYPE).newbyteorder("<"), None
        )
    type_name, _, shape = rest.partition(":")
    try:
        found = np.dtype(type_name)
        length = math.prod(int(size) for size in shape.split(",")) if shape else None
    except (TypeError, ValueError):
        found, length = np.dtype(float), None
    if kind != "ndarray" or not type_name or found.kind not in "iu":
        raise DataError(
            f"{where}: column {name} is encoded as {encoding!r}; tokens are read from "
            "ndarray:<integer dtype>, with or without a shape, or bytes: convert the folder"
        )
    if dtype is not None and found != np.dtype(dtype):
        raise DataError(
            f"{where}: column {name} holds {found} but the source's dtype says {dtype}: "
            "remove dtype from the source"
        )
    if length is not None and shard.sizes[position] not in (None, length * found.itemsize):
        raise DataError(
            f"{where}: column {name} is {encoding} yet {shard.sizes[position]} bytes long: "
            f"{_REPAIR}"
        )
    return TokenColumn(position, "ndarray", found.newbyteorder("<"), length)
