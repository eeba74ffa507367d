"""Score files: a number for every sample of a source, in parquet, bound to the data it is of.

A sample is what the loader trains on: window ``number`` of a source's stream at one ``seq_len``.
While scores are being made, finished pieces lie in ``<file>.parts``; what is there is not made
again. The header, JSON in the file's metadata, names the data by fingerprint.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmtrain.data.packing import samples_in
from llmtrain.data.source import TokenSource
from llmtrain.errors import DataError, EnvironmentFault

VERSION = 1
_KEY = b"llmtrain.scores"
_LEAST, _PIECES = 32, 4096


@dataclass(frozen=True)
class Piece:
    """Samples [low, high) of a source under checkpoint ``checkpoint`` (its place in the list)."""

    checkpoint: int
    source: str
    low: int
    high: int

    @property
    def name(self) -> str:
        """File name of the piece."""
        return f"{self.checkpoint}-{self.source}-{self.low}.parquet"


def describe(sources: Sequence[TokenSource], seq_len: int) -> dict[str, Any]:
    """The header's part that names the data: seq_len, and of each source its fingerprint."""
    facts = {
        s.name: {
            "fingerprint": s.fingerprint,
            "tokens": s.num_tokens,
            "samples": samples_in(s.num_tokens, seq_len),
        }
        for s in sources
    }
    return {"version": VERSION, "seq_len": seq_len, "sources": facts}


def pieces_of(header: dict[str, Any]) -> list[Piece]:
    """All pieces of a score file, in the order of its rows, one checkpoint after the other."""
    sizes = {name: int(source["samples"]) for name, source in header["sources"].items()}
    step = max(_LEAST, -(-sum(sizes.values()) // _PIECES))
    return [
        Piece(i, name, low, min(low + step, size))
        for i in range(len(header["checkpoints"]))
        for name, size in sizes.items()
        for low in range(0, size, step)
    ]


class ScoreParts:
    """The folder of finished pieces beside a score file that is being made."""

    def __init__(self, file: Path) -> None:
        self.file, self.folder = file, file.with_name(file.name + ".parts")

    def begin(self, header: dict[str, Any]) -> set[str]:
        """Names of the pieces that are done. Raises DataError for another header's pieces."""
        if self.file.exists():
            raise DataError(f"{self.file} exists already; delete it, or write to another --out")
        note = self.folder / "header.json"
        if note.exists():
            if json.loads(note.read_text(encoding="utf-8")) != header:
                raise DataError(
                    f"{self.folder} holds scores begun with another method, data or model; give "
                    "the same ones to go on, or delete the folder"
                )
        else:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                note.write_text(json.dumps(header), encoding="utf-8")
            except OSError as error:
                raise EnvironmentFault(
                    f"{self.folder}: cannot be written ({error.strerror})"
                ) from error
        return {path.name for path in self.folder.glob("*.parquet")}

    def write(self, piece: Piece, scores: NDArray[np.float64], tokens: NDArray[np.int64]) -> None:
        """Keep the scores of a piece; whole or not at all."""
        import pyarrow
        from pyarrow import parquet

        unfinished = self.folder / (piece.name + ".tmp")
        parquet.write_table(pyarrow.table({"tokens": tokens, "score": scores}), unfinished)
        unfinished.replace(self.folder / piece.name)

    def finish(self, header: dict[str, Any]) -> None:
        """Join the pieces to the score file, the mean over checkpoints; the folder goes."""
        import pyarrow
        from pyarrow import parquet

        schema = pyarrow.schema(
            {
                "source": pyarrow.string(),
                "number": pyarrow.int64(),
                "tokens": pyarrow.int64(),
                "score": pyarrow.float64(),
                "deviation": pyarrow.float64(),
            },
            {_KEY: json.dumps(header).encode()},
        )
        pieces = pieces_of(header)
        count = len(header["checkpoints"])
        each = len(pieces) // count
        unfinished = self.file.with_name(self.file.name + ".tmp")
        with parquet.ParquetWriter(unfinished, schema) as writer:
            for i, piece in enumerate(pieces[:each]):
                tables = [
                    parquet.read_table(self.folder / same.name)
                    for same in pieces[i : count * each : each]
                ]
                values = np.stack([table["score"].to_numpy() for table in tables])
                rows = {
                    "source": [piece.source] * (piece.high - piece.low),
                    "number": np.arange(piece.low, piece.high),
                    "tokens": tables[0]["tokens"].to_numpy(),
                    "score": values.mean(0),
                    "deviation": values.std(0),
                }
                writer.write_table(pyarrow.table(rows, schema))
        unfinished.replace(self.file)
        shutil.rmtree(self.folder)


def read_header(file: Path) -> dict[str, Any]:
    """What a score file is of. Raises DataError where it is missing or no score file."""
    import pyarrow
    from pyarrow import parquet

    try:
        metadata = parquet.read_schema(file).metadata or {}
        header: dict[str, Any] = json.loads(metadata[_KEY])
    except FileNotFoundError as error:
        raise DataError(f"{file} is missing; make it with `llmtrain data score`") from error
    except (KeyError, ValueError, OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{file} is no score file; make one with `llmtrain data score`") from error
    if header["version"] != VERSION:
        raise DataError(
            f"{file} is of version {header['version']} and this llmtrain reads {VERSION}; score "
            "the data again"
        )
    return header


def read_scores(file: Path, source: str) -> NDArray[np.float64]:
    """Scores of a source by sample number: [samples] float64, NaN for samples without a token
    that counts. Raises DataError."""
    from pyarrow import parquet

    columns = ["number", "score"]
    table = parquet.read_table(file, columns=columns, filters=[("source", "=", source)])
    numbers, scores = (table[name].to_numpy() for name in columns)
    size = int(read_header(file)["sources"][source]["samples"])
    if len(numbers) != size or not np.array_equal(numbers, np.arange(size)):
        raise DataError(f"{file} lacks samples of {source!r}; score the data again")
    return np.asarray(scores, np.float64)


def check_scores(
    file: Path, header: dict[str, Any], source: str, fingerprint: str, seq_len: int
) -> None:
    """Raise DataError where the scores of ``source`` are not of this data in this form."""
    known = header["sources"].get(source)
    if known is None:
        have = ", ".join(header["sources"])
        raise DataError(
            f"data.select.scores: {file} has no scores of the source {source!r} (it has {have}); "
            "score that source too, or list those to select in data.select.sources"
        )
    if header["seq_len"] != seq_len:
        raise DataError(
            f"data.select.scores: {file} is of samples of {header['seq_len']} tokens and "
            f"data.seq_len is {seq_len}; score the data again, or set data.seq_len="
            f"{header['seq_len']}"
        )
    if known["fingerprint"] != fingerprint:
        raise DataError(
            f"data.select.scores: {file} is of other data than the source {source!r} holds now "
            f"(fingerprint {known['fingerprint']}, now {fingerprint}); score this data, or put "
            "the old data back"
        )
