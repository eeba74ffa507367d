"""One split of a prepared source: its MDS folder, its counts and its unigram statistics."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from llmtrain.data.mds_writer import (
    CHUNK_TOKENS,
    MARKS,
    STARTS,
    STREAM,
    ShardWriter,
    token_dtype,
    write_file,
)
from llmtrain.data.tokenizer import Tokenizer


class Weighting(NamedTuple):
    """How a stream of conversations is written: its loss weights by number, and in which windows.

    pack: several conversations to a window.
    """

    table: list[float]
    window: int | None
    pack: bool


class StreamWriter:
    """Writes a stream of documents and counts what goes in.

    documents: number of them; bytes: of their UTF-8 text; histogram: [vocab] int64 token counts,
    eos included. ``state`` and ``restore`` carry all of it over an interruption. weighting: the
    documents are conversations, whose tokens come with marks; trained counts those that weigh.
    """

    def __init__(
        self,
        folder: Path,
        tokenizer: Tokenizer,
        shard_bytes: int,
        compression: str | None,
        weighting: Weighting | None = None,
    ) -> None:
        self.folder = folder
        self.eos_id = tokenizer.eos_id
        self.dtype = token_dtype(tokenizer.vocab_size)
        self.shards = ShardWriter(folder, self.dtype, shard_bytes, compression)
        self.documents = 0
        self.bytes = 0
        self.histogram = np.zeros(tokenizer.vocab_size, np.int64)
        self.trained = 0
        self.weighting = weighting
        self.marks: ShardWriter | None = None
        if weighting is not None:
            self.marks = ShardWriter(folder / MARKS, "uint8", shard_bytes, compression)

    @property
    def tokens(self) -> int:
        """Tokens of the stream so far, without the padding at its end."""
        return int(self.histogram.sum())

    def add(
        self,
        documents: int,
        size: int,
        tokens: NDArray[Any],
        marks: NDArray[np.uint8] | None = None,
    ) -> None:
        """Append ``tokens`` of so many whole documents with ``size`` bytes of text."""
        self.documents += documents
        self.bytes += size
        if self.weighting is not None and self.marks is not None and marks is not None:
            tokens, marks = self._arrange(tokens, marks, self.weighting)
            heavy = np.array(self.weighting.table)[marks & (STARTS - 1)] > 0
            self.trained += int(heavy.sum())
            self.marks.append(marks)
        self.histogram += np.bincount(tokens, minlength=len(self.histogram))
        self.shards.append(tokens)

    def _arrange(
        self, tokens: NDArray[Any], marks: NDArray[np.uint8], how: Weighting
    ) -> tuple[NDArray[Any], NDArray[np.uint8]]:
        """With padding, of weight 0, wherever a conversation would cross the end of a window."""
        if how.window is None or not len(tokens):
            return tokens, marks
        pieces: list[NDArray[Any]] = []
        notes: list[NDArray[np.uint8]] = []
        at = self.tokens
        edges = [*np.flatnonzero(marks & STARTS).tolist(), len(tokens)]
        for begin, end in itertools.pairwise(edges):
            room = -at % how.window
            if room and (end - begin > room or not how.pack):
                pieces.append(np.full(room, self.eos_id, tokens.dtype))
                notes.append(np.zeros(room, np.uint8))
                notes[-1][0] = STARTS
                at += room
            pieces.append(tokens[begin:end])
            notes.append(marks[begin:end])
            at += end - begin
        return np.concatenate(pieces), np.concatenate(notes)

    def state(self) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        """(JSON, arrays) from which ``restore`` continues."""
        plain = {
            "documents": self.documents,
            "bytes": self.bytes,
            "shards": self.shards.shards,
            "digest": self.shards.digest.hex(),
        }
        arrays = {"open": self.shards.open_tokens, "histogram": self.histogram}
        if self.marks is not None:
            plain["trained"] = self.trained
            plain["marks"] = {"shards": self.marks.shards, "digest": self.marks.digest.hex()}
            arrays["marks"] = self.marks.open_tokens
        return plain, arrays

    def restore(self, plain: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> None:
        """Continue from what ``state`` returned, in the same folder."""
        self.documents, self.bytes = plain["documents"], plain["bytes"]
        self.histogram = arrays["histogram"].astype(np.int64)
        self.shards.resume(plain["shards"], bytes.fromhex(plain["digest"]), arrays["open"])
        if self.marks is not None:
            self.trained, old = plain["trained"], plain["marks"]
            self.marks.resume(old["shards"], bytes.fromhex(old["digest"]), arrays["marks"])

    def finish(self) -> dict[str, Any]:
        """Write the end of the stream, its index and ``stream.json``; the manifest's entry."""
        self.shards.finish(self.eos_id)
        tokens = self.tokens
        content = self.shards.digest + str(tokens).encode()
        weights: dict[str, Any] = {}
        if self.marks is not None and self.weighting is not None:
            self.marks.finish(0)
            weights = {"weights": self.weighting.table, "window": self.weighting.window}
            content += self.marks.digest + json.dumps(weights).encode()
        fingerprint = xxhash.xxh64(content).hexdigest()
        counts = {"documents": self.documents, "bytes": self.bytes, "fingerprint": fingerprint}
        layout = {"dtype": self.dtype, "eos_id": self.eos_id, "chunk_tokens": CHUNK_TOKENS}
        stream = {"version": 1, "num_tokens": tokens, **layout, **counts, **weights}
        write_file(self.folder / STREAM, (json.dumps(stream, indent=1) + "\n").encode())
        entry = {"tokens": tokens, **counts, "unigram_entropy_nats": entropy(self.histogram)}
        return entry | ({"trained": self.trained, **weights} if weights else {})


def entropy(histogram: NDArray[np.int64]) -> float:
    """Entropy in nats of the distribution given by counts; 0 for no counts."""
    seen = histogram[histogram > 0].astype(np.float64)
    if not len(seen):
        return 0.0
    total = seen.sum()
    return float(np.log(total) - (seen * np.log(seen)).sum() / total)


def unigram_loss(counts: NDArray[np.int64], model: NDArray[np.int64]) -> float:
    """Nats per token of text with ``counts`` under the unigram distribution of ``model``.

    The model's counts are raised by one (Laplace), so tokens it never saw have a finite loss.
    """
    total = int(counts.sum())
    if not total:
        return 0.0
    logs = np.log((model + 1.0) / (model.sum() + len(model)))
    return float(-(counts * logs).sum() / total)
