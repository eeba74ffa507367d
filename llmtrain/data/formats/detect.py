"""Which format a path is in, and opening it."""

from __future__ import annotations

from pathlib import Path

from llmtrain.config.schema import SourceConfig
from llmtrain.data.formats import datatrove, npy
from llmtrain.data.formats.datatrove import open_datatrove
from llmtrain.data.formats.files import find_files
from llmtrain.data.formats.flat import FlatSource, naming
from llmtrain.data.formats.foundry import open_foundry
from llmtrain.data.formats.mds import open_mds
from llmtrain.data.formats.mds_index import parse_index
from llmtrain.data.formats.megatron import open_megatron
from llmtrain.data.formats.npy import open_npy
from llmtrain.data.formats.remote import is_remote
from llmtrain.errors import DataError

_FILES = {"megatron": open_megatron, "npy": open_npy, "datatrove": open_datatrove}


def open_source(
    name: str, cfg: SourceConfig, *, eos_id: int | None, cache_dir: Path | None = None
) -> FlatSource:
    """Opens a tokenized source of any format for random access.

    ``eos_id``: the document separator; formats with an index of documents do without, and a
    prepared folder knows its own. ``cache_dir``: where fetched or decompressed shards go
    (default: ``$LLMTRAIN_CACHE`` or the user's cache folder), bounded by ``cfg.cache_bytes``.

    Raises DataError naming the source, the file, what is wrong with it and the remedy.
    """
    with naming(name):
        kind = detect_format(cfg.path) if cfg.format == "auto" else cfg.format
        if kind in _FILES:
            if is_remote(cfg.path):
                raise DataError(
                    f"{cfg.path}: only MDS folders are read from remote places: copy the files "
                    "to a local disk, or convert them"
                )
            return _FILES[kind](name, cfg, eos_id=eos_id)
        opener = open_foundry if kind == "foundry" else open_mds
        return opener(name, cfg, eos_id=eos_id, cache_dir=cache_dir)


def detect_format(path: str) -> str:
    """The format of a path: mds, foundry, megatron, npy or datatrove.

    A remote address is MDS. Raises DataError when nothing known is there.
    """
    if not path:
        raise DataError("no path is given: set the path of the source")
    if is_remote(path):
        return "mds"
    place = Path(path)
    if (place / "index.json").is_file():
        return _mds_kind(place / "index.json")
    if Path(f"{path}.idx").is_file():
        return "megatron"
    files = _candidates(place, path)
    suffixes = {file.suffix for file in files}
    if any(f.suffix == ".bin" and f.with_suffix(".idx").exists() for f in files):
        return "megatron"
    if ".idx" in suffixes:
        return "megatron"
    if datatrove.SUFFIX in suffixes:
        return "datatrove"
    if suffixes & set(npy.SUFFIXES):
        return "npy"
    raise DataError(f"{path} holds no tokens in a known format{_hint(place)}")


def _candidates(place: Path, path: str) -> list[Path]:
    """Files among which the format shows."""
    known = (".idx", datatrove.SUFFIX, *npy.SUFFIXES)
    if place.is_dir():
        return [file for file in place.rglob("*") if file.suffix in known]
    return find_files(path, known)


def _mds_kind(index: Path) -> str:
    """MDS with a plain bytes column is LLM Foundry's."""
    parsed = parse_index(index.read_bytes(), str(index), None)
    return "foundry" if parsed.column is not None and parsed.column.kind == "bytes" else "mds"


def _hint(place: Path) -> str:
    """A word on what lies near."""
    below = sorted(index.parent for index in place.glob("*/index.json")) if place.is_dir() else []
    if below:
        return f": did you mean {' or '.join(map(str, below))}?"
    return (
        " (MDS, Megatron .bin/.idx, .npy or raw .bin, datatrove .ds): run `llmtrain data prepare` "
        "on text, or set the source's format"
    )
