"""Score files: a number for every sample of a source, in parquet, bound to the data it is of.

Files of token losses hold a loss for every token instead, of a reference model for ``reweight``.

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
# The method whose files hold the cross-entropy of every token.
LOSSES = "token-losses"
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
        """Keep a piece's scores [n], or token losses [n, seq_len]; whole or not at all."""
        import pyarrow
        from pyarrow import parquet

        unfinished = self.folder / (piece.name + ".tmp")
        columns = {"tokens": tokens, "score": list(scores) if scores.ndim > 1 else scores}
        parquet.write_table(pyarrow.table(columns), unfinished)
        unfinished.replace(self.folder / piece.name)

    def finish(self, header: dict[str, Any]) -> None:
        """Join the pieces to the score file, the mean over checkpoints; the folder goes."""
        import pyarrow
        from pyarrow import parquet

        losses = header["method"] == LOSSES
        fields = {
            "source": pyarrow.string(),
            "number": pyarrow.int64(),
            "tokens": pyarrow.int64(),
        }
        if losses:
            fields["losses"] = pyarrow.list_(pyarrow.float16(), header["seq_len"])
        else:
            fields |= {"score": pyarrow.float64(), "deviation": pyarrow.float64()}
        schema = pyarrow.schema(fields, {_KEY: json.dumps(header).encode()})
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
                values = np.stack([_rows(table["score"]) for table in tables])
                rows = {
                    "source": [piece.source] * (piece.high - piece.low),
                    "number": np.arange(piece.low, piece.high),
                    "tokens": tables[0]["tokens"].to_numpy(),
                }
                if losses:
                    flat = pyarrow.array(values.mean(0).astype(np.float16).ravel())
                    of_row = pyarrow.FixedSizeListArray.from_arrays(flat, header["seq_len"])
                    rows["losses"] = of_row
                else:
                    rows |= {"score": values.mean(0), "deviation": values.std(0)}
                writer.write_table(pyarrow.table(rows, schema), row_group_size=_LEAST)
        unfinished.replace(self.file)
        shutil.rmtree(self.folder)


def _rows(column: Any) -> NDArray[np.float64]:
    """A column of numbers [n], or of lists of one length [n, length]."""
    values = column.to_numpy()
    return np.stack(values) if values.dtype == object else values


class TokenLosses:
    """A file of token losses, read where it is wanted; nothing is held but its index."""

    def __init__(self, file: Path) -> None:
        """Raises DataError where ``file`` is missing or of another kind."""
        from pyarrow import parquet

        self.file, self.header = file, read_header(file)
        if self.header["method"] != LOSSES:
            raise DataError(
                f"{file} holds {self.header['method']} of samples, not the losses of their tokens; "
                f"make one with `llmtrain data score --method {LOSSES}`"
            )
        self._parquet = parquet.ParquetFile(file)
        metadata = self._parquet.metadata
        rows = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        self._starts = np.cumsum([0, *rows])
        sizes = [int(source["samples"]) for source in self.header["sources"].values()]
        firsts = np.cumsum([0, *sizes]).tolist()
        self._firsts = dict(zip(self.header["sources"], firsts[:-1], strict=True))

    def read(self, source: str, number: int) -> NDArray[np.float32]:
        """Losses [seq_len] in nats of a sample's tokens."""
        row = self._firsts[source] + number
        group = int(np.searchsorted(self._starts, row, side="right")) - 1
        column = self._parquet.read_row_group(group, columns=["losses"])["losses"]
        values = column[row - int(self._starts[group])].values.to_numpy(zero_copy_only=False)
        return np.asarray(values, np.float32)


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

    if read_header(file)["method"] == LOSSES:
        raise DataError(
            f"{file} holds losses of tokens, not scores of samples; score with another --method"
        )
    columns = ["number", "score"]
    table = parquet.read_table(file, columns=columns, filters=[("source", "=", source)])
    numbers, scores = (table[name].to_numpy() for name in columns)
    size = int(read_header(file)["sources"][source]["samples"])
    if len(numbers) != size or not np.array_equal(numbers, np.arange(size)):
        raise DataError(f"{file} lacks samples of {source!r}; score the data again")
    return np.asarray(scores, np.float64)


def check_scores(
    where: str, header: dict[str, Any], source: str, fingerprint: str, seq_len: int
) -> str:
    """The name under which the file has the scores of ``source``: its own, or one of equal data.

    where: the config key and the file, for the message. Raises DataError where there are none of
    this data in this form.
    """
    sources = header["sources"]
    same = (name for name in sources if sources[name]["fingerprint"] == fingerprint)
    name = source if source in sources else next(same, None)
    if name is None:
        have = ", ".join(header["sources"])
        raise DataError(
            f"{where} has no scores of the source {source!r} (it has {have}); score that source "
            "too (data.select.sources lists those to select from)"
        )
    if header["seq_len"] != seq_len:
        raise DataError(
            f"{where} is of samples of {header['seq_len']} tokens and "
            f"data.seq_len is {seq_len}; score the data again, or set data.seq_len="
            f"{header['seq_len']}"
        )
    if sources[name]["fingerprint"] != fingerprint:
        raise DataError(
            f"{where} is of other data than the source {source!r} holds now "
            f"(fingerprint {sources[name]['fingerprint']}, now {fingerprint}); score this data, or "
            "put the old data back"
        )
    return name
